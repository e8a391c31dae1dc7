"""The backward pass in Metal, on the runner."""
