"""Who computes: the tiers of this project, stock PyTorch, and other packages where they are installed.

A contender turns a workload and its inputs into a call without arguments, whose result is the output in the layout of
q and, in training, the gradients of q, k and v. Masks that its interface needs are made beforehand and not timed.
`Unsupported` says why there is no call.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ... import describe, problem
from ...frontends import fa2
from ...tiers import BY_NAME, ORDER, Tier
from ...tiers.metal import compiler
from .workloads import Inputs, Workload

STOCK = "stock SDPA"

Call = Callable[[], tuple[torch.Tensor, ...]]
_GRADIENTS = frozenset("qkv")


class Unsupported(Exception):
    """This contender does not compute such a workload."""


class Contender(NamedTuple):
    name: str
    prepare: Callable[[Workload, Inputs], Call]
    ours: bool = False


def contenders(device_type: str, full: bool, hub: bool) -> list[Contender]:
    """Those available on this machine. `full`: the scalar tier too. `hub`: kernels that have to be downloaded."""
    tiers = [
        tier
        for tier in (BY_NAME.values() if full else ORDER)
        if (device_type in compiler.device_types if tier.metal else tier.name != "cpu" or device_type == "cpu")
    ]
    found = [Contender(f"mtlflashattn {tier.name}", functools.partial(_ours, tier), True) for tier in tiers]
    found.append(Contender(STOCK, _differentiated(_stock)))
    if device_type == "mps":
        for name, prepare in (
            ("metal_flash_attn", _flash_attn_like("metal_flash_attn")),  # PyPI's mtlflashattn, another project
            ("mps_flash_attn", _differentiated(_mps_flash_attn)),
        ):
            if importlib.util.find_spec(name) is not None:
                found.append(Contender(name, prepare))
        if hub and importlib.util.find_spec("kernels") is not None:
            found.append(
                Contender("metal-flash-sdpa", _flash_attn_like("kernels-community/metal-flash-sdpa", hub=True))
            )
    return found


def build(workload: Workload, x: Inputs) -> problem.AttentionProblem:
    """The workload as every public function of this project describes it."""
    options = describe.CallOptions(causal=workload.causal, window_size=(workload.window, -1))
    if workload.packed:
        p = describe.varlen(x.q, x.k, x.v, x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen, options)
    elif workload.kind == "decode":
        p = _cached(workload, x, options)
    else:
        p = describe.dense(x.q, x.k, x.v, options)
    return dataclasses.replace(p, needs_grad=True, want_lse=True) if workload.training else p


def _cached(workload: Workload, x: Inputs, options: describe.CallOptions) -> problem.AttentionProblem:
    """As `flash_attn_with_kvcache` describes it: the lengths are on the device."""
    batch, (queries, keys) = len(workload.lengths), workload.lengths[0]
    return problem.AttentionProblem(
        x.q,
        x.k,
        x.v,
        batch,
        queries,
        keys,
        **options.checked(x.q, batch),
        seqused_k=x.seqused,
        block_table=x.block_table,
        k_descale=x.descale,
        v_descale=x.descale,
    )


def by_tier(tier: Tier, workload: Workload, x: Inputs) -> tuple[torch.Tensor, ...] | None:
    """What a contender's call gives, by that tier alone. None where one of its kernels does not compile."""
    p = build(workload, x)  # what the caller pays on the host is part of the time
    result = tier.run(p)
    if result is None:
        return None
    if x.dout is None:
        return (result.out,)
    assert result.lse is not None
    assert tier.backward is not None
    grads = tier.backward(p, result.out, result.lse, x.dout, None, _GRADIENTS)
    if grads is None:
        return None
    return tuple(t for t in (result.out, *grads[:3]) if t is not None)


def _ours(tier: Tier, workload: Workload, x: Inputs) -> Call:
    p = build(workload, x)
    reasons = tier.unsupported_reasons(p)
    if workload.training:
        reasons += tier.unsupported_backward_reasons(p, False, _GRADIENTS)
    if reasons:
        raise Unsupported("; ".join(dict.fromkeys(reasons)))

    def call() -> tuple[torch.Tensor, ...]:
        found = by_tier(tier, workload, x)
        if found is None:
            raise Unsupported("its kernel does not work on this machine")
        return found

    return call


def _differentiated(
    prepare: Callable[[Workload, Inputs], Callable[[], torch.Tensor]],
) -> Callable[[Workload, Inputs], Call]:
    """A contender whose gradients are autograd's, from `prepare`, whose call gives the output."""

    def prepared(workload: Workload, x: Inputs) -> Call:
        if not workload.training:
            call = prepare(workload, x)
            return lambda: (call(),)
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        with torch.enable_grad():
            call = prepare(workload, dataclasses.replace(x, q=leaves[0], k=leaves[1], v=leaves[2]))

        def both() -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                out = call()
            return (out.detach(), *torch.autograd.grad(out, leaves, x.dout))

        return both

    return prepared


def _stock(workload: Workload, x: Inputs) -> Callable[[], torch.Tensor]:
    gqa = workload.heads != workload.heads_k
    if workload.packed:  # it has no packed form: a call for each sequence, their lengths known on the host
        q, k, v = (t.split([length for length, _ in workload.lengths]) for t in (x.q, x.k, x.v))

        def one(*qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.transpose(0, 1)[None] for t in qkv)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=workload.causal, enable_gqa=gqa)
            return out[0].transpose(0, 1)

        return lambda: torch.cat([one(*qkv) for qkv in zip(q, k, v, strict=True)])
    if workload.codes:
        raise Unsupported("does not read quantised caches")
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    queries, keys = workload.lengths[0]
    mask = None
    if workload.window >= 0 or (workload.causal and 1 < queries < keys):  # its is_causal aligns first with first
        distance = (
            torch.arange(queries, device=q.device)[:, None] + keys - queries - torch.arange(keys, device=q.device)
        )
        mask = (distance >= 0) & (distance <= (workload.window if workload.window >= 0 else keys))
    causal = workload.causal and mask is None and queries > 1

    def call(k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa).transpose(1, 2)

    table = x.block_table
    if table is None:
        return call
    # It has no pages: they are gathered for each call.
    return lambda: call(*(pages[table].flatten(1, 2).transpose(1, 2) for pages in (x.k, x.v)))


def _flash_attn_like(name: str, hub: bool = False) -> Callable[[Workload, Inputs], Call]:
    """A package with FlashAttention-2's functions."""

    def prepare(workload: Workload, x: Inputs) -> Callable[[], torch.Tensor]:
        _needs_plain_cache(workload)
        module = importlib.import_module("kernels").get_kernel(name) if hub else importlib.import_module(name)
        wanted = fa2.flash_attn_varlen_func if workload.packed else fa2.flash_attn_func
        function = getattr(module, wanted.__name__, None)
        if function is None:
            raise Unsupported(f"has no {wanted.__name__}")
        how: dict[str, Any] = {"causal": workload.causal}
        if workload.window >= 0:
            how["window_size"] = (workload.window, 0)
        if x.cu_seqlens is not None:
            cu_seqlens = x.cu_seqlens, x.cu_seqlens.clone()
            return lambda: function(x.q, x.k, x.v, *cu_seqlens, x.max_seqlen, x.max_seqlen, **how)
        return lambda: function(x.q, x.k, x.v, **how)

    return _differentiated(prepare)


def _needs_plain_cache(workload: Workload) -> None:
    if workload.page_size or workload.codes:
        raise Unsupported("is not timed on pages and quantised caches")


def _mps_flash_attn(workload: Workload, x: Inputs) -> Callable[[], torch.Tensor]:
    _needs_plain_cache(workload)
    if workload.packed:
        raise Unsupported("does not support packed sequences")
    function = importlib.import_module("mps_flash_attn").flash_attention
    q, k, v = (t.transpose(1, 2).contiguous() for t in (x.q, x.k, x.v))
    how = {"window_size": workload.window} if workload.window >= 0 else {}
    causal = workload.causal and workload.lengths[0][0] > 1
    return lambda: function(q, k, v, is_causal=causal, **how).transpose(1, 2)
