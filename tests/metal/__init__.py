"""The Metal kernels and their host side, on the runner of metal_host.

test_kernels: the grid of `grid.py`, drawn by `calls.py`, instrumented; test_masks: masks with structure; test_values,
test_arguments: what a kernel gets and must not be misled by; test_public, test_dispatch, test_host: from the functions
to the launch; test_counters: how much a kernel does.
"""
