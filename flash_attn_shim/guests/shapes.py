"""Which shape of a result a program was written for, by the uses that `results.py` finds."""

from __future__ import annotations

import ast

from flash_attn_shim.guests.results import Result
from flash_attn_shim.guests.source import dotted

#: Functions of `flash_attn_interface` that returned `(out, softmax_lse)` in early builds.
WITH_EARLY_RESULTS = ("flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func")


def four_values(result: Result) -> str | None:
    """Why `unpad_input` returns four values there; "" if it returns five, None if the caller's caller must be asked."""
    uses = set(result.uses)
    if "returned" in uses:
        return None if uses <= {"returned", "nothing"} else ""
    unpacks = {use[1] for use in uses if use[0] == "unpack"}
    return "returns 4 values: the program unpacks four" if unpacks == {4} else ""


def early_result(is_varlen: bool, batch: int | None, result: Result) -> str | None:
    """Why a function of FlashAttention 3 gives `(out, softmax_lse)` there; "" if it does not, None as above.

    A tensor of (batch, ...) can be indexed and unpacked too. `[0]` of one would throw away what was computed for all
    but one entry: it is meant where the program has made that batch of one itself. Two entries of a batch of two are
    told from (out, softmax_lse) by the second name, and by whether it is used.
    """
    uses = set(result.uses) - {"nothing"}
    if uses == {"returned"}:
        return None
    kinds = {use[0] if isinstance(use, tuple) else use for use in uses}
    indices = {use[1] for use in uses if use[0] == "index"}
    if not kinds or not kinds <= {"index", "unpack", "star"} or not indices <= {0, 1} or indices == {1}:
        return ""
    if indices and not is_varlen and result.makes_batch_of_one:
        return ""
    if not all(_is_early_unpacking(result.source, targets, is_varlen, batch) for targets in result.targets):
        return ""
    how = "indexes" if kinds == {"index"} else "unpacks"
    return f"returns (out, softmax_lse): the program {how} the result, as early builds had it"


def _is_early_unpacking(source, targets, is_varlen, batch):
    """`out, lse = f(...)` or `out, *_ = f(...)`"""
    starred = [n for n, target in enumerate(targets) if isinstance(target, ast.Starred)]
    if starred:
        return starred[0] <= 2 and _is_unused(source, targets[starred[0]].value)
    if len(targets) != 2:
        return False
    name = dotted(targets[1]).rpartition(".")[2].lower()
    if is_varlen or "lse" in name or "softmax" in name or _is_unused(source, targets[1]):
        return True
    return batch is not None and batch != 2  # a tensor could not be unpacked into two


def _is_unused(source, target):
    if not isinstance(target, ast.Name):
        return False
    loads = (n for n in ast.walk(source.scope(target)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return target.id.startswith("_") or all(n.id != target.id for n in loads)
