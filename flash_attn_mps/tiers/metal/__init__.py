"""The host side of the Metal kernels."""
