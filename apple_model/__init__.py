"""A cost model of attention kernels on Apple's GPUs, M1 to M4: see README.md."""
