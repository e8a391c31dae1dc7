"""The ways in which programs come to the gradients of one attention call, of q, k, v `(batch, seqlen, heads, dim)`.

Each takes q, k, v and the gradient of the output, and gives those of q, k and v.
"""

import threading
import types

import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from flash_attn_mps import flash_attention, sdpa
from flash_attn_mps.frontends import fa2, fa2_private, fa3, fa3_private
from flash_attn_mps.integrations import transformers, transformers_fa2
from flash_attn_mps.sdpa import obstacles, registration, settings
from tests.compiled import compiled

from .test_varlen import cumulative


def leaves(*tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


def through(attention):
    """By autograd, of a function of q, k and v."""

    def route(q, k, v, dout):
        tensors = leaves(q, k, v)
        attention(*tensors).backward(dout)
        return [tensor.grad for tensor in tensors]

    return route


def packed(function):
    """The batch as packed sequences of the same length."""

    def attention(q, k, v):
        cu, longest = cumulative([q.shape[1]] * len(q)), q.shape[1]
        out = function(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu, cu, longest, longest)
        return (out[0] if isinstance(out, tuple) else out).unflatten(0, q.shape[:2])

    return attention


def heads_first(function):
    def attention(q, k, v):
        return function(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)

    return attention


def in_a_graph(attention):
    def route(q, k, v, dout):
        return through(compiled(attention)[0])(q, k, v, dout)

    return route


def ahead_of_time(q, k, v, dout):
    from functorch.compile import aot_function, nop

    return through(aot_function(fa2.flash_attn_func, nop))(q, k, v, dout)


def checkpointed(reentrant):
    return through(lambda *qkv: checkpoint(fa2.flash_attn_func, *qkv, use_reentrant=reentrant))


def offloaded(q, k, v):
    with save_on_cpu():
        return fa2.flash_attn_func(q, k, v)


def under_autocast(q, k, v):
    """Each a projection, which autocast computes in bfloat16, as it does in a model."""
    with torch.autocast(q.device.type, torch.bfloat16):
        out = fa2.flash_attn_func(*(F.linear(tensor, torch.eye(tensor.shape[-1])) for tensor in (q, k, v)))
    assert out.dtype == torch.bfloat16
    return out.float()


def packed_qkv(q, k, v):
    heads = q.shape[2] // k.shape[2]
    return fa2.flash_attn_qkvpacked_func(torch.stack([q, *(x.repeat_interleave(heads, 2) for x in (k, v))], 2))


def private(q, k, v, dout):
    options = (0.0, q.shape[-1] ** -0.5, False, -1, -1, 0.0, None)
    out, lse, *_ = fa2_private._flash_attn_forward(q, k, v, *options, False)
    grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
    fa2_private._flash_attn_backward(dout, q, k, v, out, lse, *grads, *options, False)
    return grads


def private_in_a_graph(q, k, v, dout):
    return compiled(private)[0](q, k, v, dout)


def private_varlen(q, k, v, dout):
    flat, cu = [tensor.flatten(0, 1) for tensor in (q, k, v)], cumulative([q.shape[1]] * len(q))
    options = (cu, cu, q.shape[1], k.shape[1], 0.0, q.shape[-1] ** -0.5, False, -1, -1, 0.0, None, False)
    out, lse, *_ = fa2_private._flash_attn_varlen_forward(*flat, *options)
    grads = [torch.empty_like(tensor) for tensor in flat]
    fa2_private._flash_attn_varlen_backward(dout.flatten(0, 1), *flat, out, lse, *grads, *options)
    return [grad.view_as(tensor) for grad, tensor in zip(grads, (q, k, v), strict=True)]


def private_of_fa3(q, k, v, dout):
    out, lse, *_ = fa3_private._flash_attn_forward(q, k, v)
    grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
    fa3_private._flash_attn_backward(dout, q, k, v, out, lse, dq=grads[0], dk=grads[1], dv=grads[2])
    return grads


def ring(q, k, v, dout):
    """As ring attention: each process has half of the keys, and output and log-sum-exp of all of them."""
    options = (0.0, q.shape[-1] ** -0.5, False, -1, -1, 0.0, None)
    halves = list(zip(k.chunk(2, 1), v.chunk(2, 1), strict=True))
    parts = [fa2_private._flash_attn_forward(q, *half, *options, False)[:2] for half in halves]
    lse = torch.logaddexp(*(lse for _, lse in parts))
    out = sum(part * (part_lse - lse).exp().transpose(1, 2)[..., None] for part, part_lse in parts)
    dq, dkv = torch.zeros_like(q), []
    for half in halves:
        grads = [torch.empty_like(tensor) for tensor in (q, *half)]
        fa2_private._flash_attn_backward(dout, q, *half, out, lse, *grads, *options, False)
        dq += grads[0]
        dkv.append(grads[1:])
    return dq, *(torch.cat(grads, 1) for grads in zip(*dkv, strict=True))


def instead_of_torchs(monkeypatch):
    """F.scaled_dot_product_attention on a device that counts as MPS, whose every call is taken."""
    threads = threading.active_count()
    monkeypatch.setattr(registration, "_is_alone", lambda: threading.active_count() <= threads)
    monkeypatch.setattr(obstacles, "DEVICE", "cpu")
    monkeypatch.setattr(settings, "read", lambda: settings.Settings((2, 13), budget=1))
    sdpa.reset()


def sdpa_route(q, k, v):
    with sdpa.installed():
        return heads_first(lambda *qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True))(q, k, v)


def mps_fa(q, k, v):
    module = types.SimpleNamespace(is_causal=False)
    return transformers.attention(module, *(x.transpose(1, 2) for x in (q, k, v)), None)[0]


def mps_fa_padded(q, k, v):
    """With a mask of transformers, which packs what is not padding: here, all."""
    keep = torch.ones(len(q), k.shape[1], dtype=torch.bool)
    module = types.SimpleNamespace(is_causal=False)
    return transformers.attention(module, *(x.transpose(1, 2) for x in (q, k, v)), keep)[0]


ROUTES = {
    "FA2": through(fa2.flash_attn_func),
    "FA2, qkvpacked": through(packed_qkv),
    "FA2, kvpacked": through(lambda q, k, v: fa2.flash_attn_kvpacked_func(q, torch.stack((k, v), 2))),
    "FA2, varlen": through(packed(fa2.flash_attn_varlen_func)),
    "FA3": through(fa3.flash_attn_func),
    "FA3, varlen": through(packed(fa3.flash_attn_varlen_func)),
    "flash_attention": through(heads_first(flash_attention)),
    "transformers' FA2": through(transformers_fa2.flash_attn_func),
    "transformers' FA2, varlen": through(packed(transformers_fa2.flash_attn_varlen_func)),
    "mps_fa": through(mps_fa),
    "mps_fa, padded": through(mps_fa_padded),
    "sdpa": through(sdpa_route),
    "torch.compile": in_a_graph(fa2.flash_attn_func),
    "torch.compile, varlen": in_a_graph(packed(fa2.flash_attn_varlen_func)),
    "torch.compile, private": private_in_a_graph,
    "AOT": ahead_of_time,
    "checkpoint": checkpointed(False),
    "checkpoint, reentrant": checkpointed(True),
    "saved-tensor hooks": through(offloaded),
    "autocast": through(under_autocast),
    "private": private,
    "private, varlen": private_varlen,
    "private, FA3": private_of_fa3,
    "ring": ring,
}
BACKWARD_PASSES = {"ring": 2}  # of the others, one
