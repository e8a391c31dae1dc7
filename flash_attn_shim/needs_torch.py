"""Imported first by every presented module that needs torch and `flash_attn_mps`.

A torch that is missing or broken becomes an ImportError: it may raise OSError or RuntimeError, which callers that guard
`from flash_attn import ...` by `except ImportError` do not expect.
"""

from flash_attn_shim import owners as _owners

try:
    import torch  # noqa: F401
except Exception as error:
    raise ImportError(
        f"flash_attn (presented by mtlflashattn) needs torch, and importing torch failed: {error!r}"
    ) from error

if _foreign := _owners.foreign_package():
    raise ImportError(f"flash_attn (presented by mtlflashattn) cannot be served: {_foreign}.")

# The package before its submodules: two threads that begin with different submodules of a package whose __init__
# imports them wait for each other, and CPython ends that with a RuntimeError (_DeadlockError).
import flash_attn_mps  # noqa: F401
