"""Ring attention as ring-flash-attn and yunchang compute it: what one process of several does, and with which tokens.

The functions `attend_*` run in a process of `processes.Pool`. Every process draws the whole problem from the same seed,
takes its tokens, calls the package, and returns what it computed together with the indices of these tokens.
"""

import functools
import sys
import types

import torch
import torch.distributed as dist

from flash_attn import flash_attn_interface as interface

HEADS, HEAD_DIM = 4, 16
# Lengths of packed sequences: multiples of 2 * 4, since zigzag gives each of 4 processes two parts of every sequence.
PACKED = (8, 24, 16)
# llama3 gives each process one stretch of the whole batch, wherever its sequences begin.
RAGGED = (5, 19, 1, 23)
DENSE = (32, 32)


def draw(dtype, lengths, heads_k=HEADS):
    """q, k, v and the gradient of the output, `(tokens, heads, head_dim)`, of the sequences of a batch."""
    generator = torch.Generator().manual_seed(sum(lengths))
    heads = (HEADS, heads_k, heads_k, HEADS)
    return [torch.randn(sum(lengths), h, HEAD_DIM, generator=generator).to(dtype) for h in heads]


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tokens_of(layout, lengths, rank, size):
    """The tokens of a packed batch that one process of `size` holds, in its order."""
    if layout == "llama3":
        return torch.arange(sum(lengths)).chunk(size)[rank]
    held = []
    for sequence in torch.arange(sum(lengths)).split(list(lengths)):
        if layout == "stripe":
            held.append(sequence[rank::size])
        elif layout == "zigzag":
            parts = sequence.chunk(2 * size)
            held += [parts[rank], parts[2 * size - 1 - rank]]
        else:
            held.append(sequence.chunk(size)[rank])
    return torch.cat(held)


@functools.cache
def ring_flash_attn():
    """The package, without its adapter for transformers' Llama, which imports a name that transformers 5 has not."""
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules[adapters.__name__] = adapters
    import ring_flash_attn

    return ring_flash_attn


def call(function, form, q, k, v, *arguments, **options):
    """Call one of the three forms of a function: q, k, v apart, or some of them in one tensor."""
    if form == "_kvpacked":
        return function(q, torch.stack((k, v), -3), *arguments, **options)
    if form == "_qkvpacked":
        return function(torch.stack((q, k, v), -3), *arguments, **options)
    return function(q, k, v, *arguments, **options)


def attend_ring(rank, group, layout, is_varlen, form, causal, dtype, lengths, heads_k):
    """`(tokens, out, lse, dq, dk, dv)` of one process with a function of ring-flash-attn."""
    package, size = ring_flash_attn(), group.size()
    tokens = tokens_of(layout, lengths, rank, size)
    whole = draw(dtype, lengths, heads_k)
    q, k, v, dout = (tensor[tokens] for tensor in whole)
    options = {"causal": causal, "return_attn_probs": True, "group": group}
    if is_varlen:
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        name = {"zigzag": "zigzag_ring", "llama3": "llama3"}.get(layout, "ring")
        function = getattr(package, f"{name}_flash_attn_varlen{form}_func")
        if layout == "llama3":
            *about, local_k = package.llama3_flash_attn_prepare_cu_seqlens(ends(lengths), causal, rank, size)
            out, lse, _ = call(function, form, *leaves, *about, heads_k_stride=1, local_k_slice=local_k, **options)
        else:
            out, lse, _ = call(function, form, *leaves, ends(lengths) // size, max(lengths) // size, **options)
    else:
        leaves = [tensor.unflatten(0, (len(lengths), -1)).requires_grad_() for tensor in (q, k, v)]
        name = {"zigzag": "zigzag_ring", "ring": "ring"}.get(layout, layout)
        out, lse, _ = call(getattr(package, f"{name}_flash_attn{form}_func"), form, *leaves, **options)
        dout = dout.unflatten(0, (len(lengths), -1))
    grads = torch.autograd.grad(out, leaves, dout)
    if not is_varlen:
        lse = lse.transpose(0, 1).flatten(1)
        out, *grads = (tensor.flatten(0, 1) for tensor in (out, *grads))
    return tokens, out.detach(), lse.detach(), *grads


def attend_yunchang(rank, _, kind, layout, degrees, causal, dtype, heads_k):
    """`(tokens, out, None, dq, dk, dv)` of one process with an attention layer of yunchang.

    `degrees` (ulysses, ring): over how many processes heads and tokens are spread. Where they are fewer than there
    are, each set of them has the whole problem.
    """
    import yunchang
    from yunchang.comm import EXTRACT_FUNC_DICT

    ulysses, ring = degrees
    size = ulysses * ring
    yunchang.set_seq_parallel_pg(ulysses, ring, rank, dist.get_world_size())
    index = torch.arange(sum(DENSE)).view(len(DENSE), -1, 1)
    held = EXTRACT_FUNC_DICT[layout](index, rank % size, world_size=size, rd=ring, ud=ulysses)
    tokens = held.flatten()
    q, k, v, dout = (tensor[tokens].unflatten(0, held.shape[:2]) for tensor in draw(dtype, DENSE, heads_k))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    if kind == "qkvpacked":
        layer = yunchang.LongContextAttentionQKVPacked(ring_impl_type=layout, attn_type=yunchang.kernels.AttnType.FA)
        out = layer(torch.stack(leaves, 2), causal=causal)
    elif kind == "hybrid":
        layer = yunchang.LongContextAttention(ring_impl_type=layout, attn_type=yunchang.kernels.AttnType.FA)
        out = layer(*leaves, causal=causal)
    else:
        attn_type = yunchang.kernels.AttnType.from_string(kind)
        layer = yunchang.UlyssesAttention(yunchang.globals.PROCESS_GROUP.ULYSSES_PG, attn_type=attn_type)
        out = layer(*leaves, causal=causal)
    grads = torch.autograd.grad(out, leaves, dout)
    out, *grads = (tensor.flatten(0, 1) for tensor in (out, *grads))
    return tokens, out.detach(), None, *grads


def passed_on(tensor, group):
    """What the previous process of the ring has, while this one's tensor goes to the next."""
    rank, size, received = group.rank(), group.size(), torch.empty_like(tensor)
    send = dist.P2POp(dist.isend, tensor, dist.get_global_rank(group, (rank + 1) % size), group)
    receive = dist.P2POp(dist.irecv, received, dist.get_global_rank(group, (rank - 1) % size), group)
    for request in dist.batch_isend_irecv([send, receive]):
        request.wait()
    return received


def attend_float32(rank, group, is_varlen, causal, lengths, heads_k):
    """As `attend_ring` for the layout "ring", without a package: neither of the two computes float32."""
    size = group.size()
    tokens = tokens_of("ring", lengths, rank, size)
    q, k, v, dout = (tensor[tokens] for tensor in draw(torch.float32, lengths, heads_k))
    about = (0.0, HEAD_DIM**-0.5)
    unmasked = (-1, -1, 0.0, None, False)
    if is_varlen:
        forward, backward = interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward
        about = (ends(lengths) // size, ends(lengths) // size, max(lengths) // size, max(lengths) // size, *about)
    else:
        forward, backward = interface._flash_attn_forward, interface._flash_attn_backward
        q, k, v, dout = (tensor.unflatten(0, (len(lengths), -1)) for tensor in (q, k, v, dout))

    # In step n a process has the keys of the n-th process before it: with a causal mask, none of its own future.
    steps = [step for step in range(size) if not causal or step <= rank]
    kv, parts = torch.stack((k, v)), []
    for step in range(size):
        if step in steps:
            parts.append(forward(q, *kv, *about, causal and step == 0, *unmasked)[:2])
        kv = passed_on(kv, group)
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse).transpose(-1, -2)[..., None]
    out = sum(weight * part for weight, (part, _) in zip(weights, parts, strict=True))

    dq, dkv = torch.zeros_like(q), torch.zeros_like(kv)
    for step in range(size):
        if step in steps:
            buffers = [torch.full_like(tensor, torch.nan) for tensor in (q, *kv)]
            backward(dout, q, *kv, out, lse, *buffers, *about, causal and step == 0, *unmasked)
            dq += buffers[0]
            dkv += torch.stack(buffers[1:])
        kv, dkv = passed_on(kv, group), passed_on(dkv, group)
    results = (out, dq, *dkv)
    if not is_varlen:
        lse, results = lse.transpose(0, 1).flatten(1), (tensor.flatten(0, 1) for tensor in results)
    out, *grads = results
    return tokens, out, lse, *grads
