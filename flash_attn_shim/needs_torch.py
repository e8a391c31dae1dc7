"""Imported first by every presented module that needs torch: a torch that is missing or broken becomes an ImportError.

A broken torch raises OSError or RuntimeError, too, which callers that guard `from flash_attn import ...` by `except
ImportError` do not expect.
"""

try:
    import torch  # noqa: F401
except Exception as error:
    raise ImportError(
        f"flash_attn (presented by mtlflashattn) needs torch, and importing torch failed: {error!r}"
    ) from error
