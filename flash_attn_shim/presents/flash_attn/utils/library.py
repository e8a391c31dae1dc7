"""`flash_attn.utils.library`."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def triton_op(
    name: str,
    fn: Callable | None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    schema: str | None = None,
    allow_decomposition: bool = True,
) -> Callable:
    """Upstream's wrapper of triton kernels as torch operators. There is no triton here."""
    raise NotImplementedError(f"triton_op: the operator {name!r} is written in triton, which needs CUDA")
