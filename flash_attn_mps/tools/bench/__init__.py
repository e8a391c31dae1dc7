"""`mtlflashattn bench`: this machine's ways to compute attention, side by side."""
