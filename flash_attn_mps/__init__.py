"""FlashAttention for PyTorch on Apple silicon."""

__version__ = "0.1.0"
