"""Attention written as plainly as possible: one head of one sequence at a time, the score matrix in full.

Every function computes in the dtype of its inputs. Fed with float64 it is the oracle; fed with the dtype under test
it is the "plain PyTorch implementation" of the error rule in `rule.py`. Nothing here imports the product.

Semantics: with offset = seqlen_k - seqlen_q, query i sees key j iff i + offset - left <= j <= i + offset + right (a
negative bound is open, causal is right = 0); a score is scaled, soft-capped, biased by ALiBi, masked; a query that
sees no key gives zeros and a log-sum-exp of -inf. A sink is one more score of every query of its head, with value 0.
FlashAttention-3's qv adds qv v^T to the scores before the scale; under its attention_chunk, query i also sees only the
chunk of keys in which position i + offset lies.
"""

import math
from typing import NamedTuple

import torch


class Attended(NamedTuple):
    """Dense: out (B, Sq, H, Dv), lse (B, H, Sq), p (B, H, Sq, Sk).

    Packed: out (total_q, H, Dv), lse (H, total_q), p a list of (H, sq, sk).
    """

    out: torch.Tensor
    lse: torch.Tensor
    p: object


class Cached(NamedTuple):
    """What a call with a KV cache gives: out (B, Sq, H, Dv), lse (B, H, Sq), and both caches after the append."""

    out: torch.Tensor
    lse: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def one_head(q, k, v, *, scale, causal, window, softcap, slope, keep, dropout_p, chunk, qv, mask=None, sink=None):
    """q (Sq, D), k (Sk, D), v (Sk, Dv), keep (Sq, Sk) or None: out (Sq, Dv), lse (Sq,), undropped p (Sq, Sk).

    mask (Sq, Sk): bool, False hides, or added to the scores. sink: 0-d.
    """
    seqlen_q, seqlen_k = q.shape[0], k.shape[0]
    distance = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q) - torch.arange(seqlen_k)[None, :]
    left, right = int(window[0]), 0 if causal else int(window[1])
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    if chunk > 0:  # a query sees its own chunk of positions
        place, key = distance + torch.arange(seqlen_k)[None, :], torch.arange(seqlen_k)[None, :]
        seen &= (key >= place - place % chunk) & (key < place - place % chunk + chunk)

    s = (q @ k.T) * scale
    if qv is not None:
        s = s + (qv @ v.T) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if slope is not None:
        s = s - (slope.double() * distance.abs()).to(s.dtype)
    if mask is not None and mask.dtype == torch.bool:
        seen &= mask
    elif mask is not None:
        s = s + mask.to(s.dtype)
    s = s.masked_fill(~seen, -math.inf)
    if sink is not None:
        s = torch.cat([s, sink.to(s.dtype).expand(seqlen_q, 1)], dim=-1)

    sees_some = ~torch.isneginf(s.detach()).all(dim=-1)
    row_max = torch.where(sees_some, s.detach().amax(dim=-1), 0.0) if s.shape[-1] else s.new_zeros(seqlen_q)
    weight = torch.exp(s - row_max[:, None])
    total = weight.sum(dim=-1)
    weight = weight[:, :seqlen_k]
    total = torch.where(sees_some, total, 1.0)
    p = weight / total[:, None]
    lse = torch.where(sees_some, row_max + torch.log(total), -math.inf)
    kept = p if keep is None else p * keep.to(p.dtype) / (1.0 - dropout_p)
    return kept @ v, lse, p


def one_sequence(
    q,
    k,
    v,
    *,
    slopes=None,
    keep=None,
    qv=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    dropout_p=0.0,
    attention_chunk=0,
    mask=None,
    sinks=None,
):
    """q (Sq, H, D), k (Sk, Hkv, D), v (Sk, Hkv, Dv), qv (Sq, H, Dv), slopes, sinks (H,), keep, mask (H, Sq, Sk)."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    if softmax_scale is None:
        softmax_scale = float(q.shape[-1] + (0 if qv is None else qv.shape[-1])) ** -0.5
    done = [
        one_head(
            q[:, h],
            k[:, h // group],
            v[:, h // group],
            scale=float(softmax_scale),
            causal=causal,
            window=window_size,
            softcap=softcap,
            slope=None if slopes is None else slopes[h],
            keep=None if keep is None else keep[h],
            dropout_p=dropout_p,
            chunk=attention_chunk,
            qv=None if qv is None else qv[:, h],
            mask=None if mask is None else mask[h],
            sink=None if sinks is None else sinks[h],
        )
        for h in range(heads)
    ]
    out, lse, p = zip(*done, strict=True)
    return torch.stack(out, dim=1), torch.stack(lse), torch.stack(p)


def _slopes_of(alibi_slopes, b):
    return alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]


def _rules(softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, dropout_p=0.0, attention_chunk=0):
    return locals()


def dense(q, k, v, qv=None, *, alibi_slopes=None, keep=None, **how):
    """q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), qv (B, Sq, H, Dv).

    alibi_slopes is (H,) or (B, H), keep (B, H, Sq, Sk).
    """
    rules = _rules(**how)
    done = [
        one_sequence(
            q[b],
            k[b],
            v[b],
            qv=None if qv is None else qv[b],
            slopes=_slopes_of(alibi_slopes, b),
            keep=None if keep is None else keep[b],
            **rules,
        )
        for b in range(q.shape[0])
    ]
    out, lse, p = zip(*done, strict=True)
    return Attended(torch.stack(out), torch.stack(lse), torch.stack(p))


def varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    qv=None,
    seqused_q=None,
    seqused_k=None,
    block_table=None,
    alibi_slopes=None,
    keep=None,
    **how,
):
    """q (total_q, H, D), k (total_k, Hkv, D) or, with block_table, (num_blocks, page_size, Hkv, D).

    keep is (B, H, max_sq, max_sk). Rows of q that belong to no sequence, or lie beyond seqused_q, see nothing.
    """
    rules = _rules(**how)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf)
    rows, places, probabilities = [], [], []
    for b in range(len(starts_q) - 1):
        length_q = starts_q[b + 1] - starts_q[b] if seqused_q is None else int(seqused_q[b])
        length_k = starts_k[b + 1] - starts_k[b] if seqused_k is None else int(seqused_k[b])
        place = torch.arange(starts_q[b], starts_q[b] + length_q)
        if block_table is None:
            k_b = k[starts_k[b] : starts_k[b] + length_k]
            v_b = v[starts_k[b] : starts_k[b] + length_k]
        else:
            k_b, v_b = gather_pages(k, block_table[b], length_k), gather_pages(v, block_table[b], length_k)
        out_b, lse_b, p_b = one_sequence(
            q[place],
            k_b,
            v_b,
            qv=None if qv is None else qv[place],
            slopes=_slopes_of(alibi_slopes, b),
            keep=None if keep is None else keep[b, :, :length_q, :length_k],
            **rules,
        )
        rows.append(out_b)
        places.append(place)
        probabilities.append(p_b)
        lse[:, place] = lse_b
    if rows:
        out = out.index_put((torch.cat(places),), torch.cat(rows))
    return Attended(out, lse, probabilities)


def gather_pages(cache, pages, length):
    """The first `length` tokens of the sequence that lies in `pages` of a paged cache (num_blocks, page_size, Hkv,
    D).
    """
    page_size = cache.shape[1]
    tokens = [cache[int(pages[t // page_size]), t % page_size] for t in range(length)]
    return torch.stack(tokens) if tokens else cache.new_zeros(0, *cache.shape[2:])


def rotate(x, cos, sin, positions, interleaved):
    """Rotary embedding of x (S, H, D): pair c of token t turns by the angle whose cosine is cos[positions[t], c].

    Interleaved pairs are the dimensions (2c, 2c + 1), otherwise (c, c + rotary_dim / 2); further ones stay.
    """
    half = cos.shape[1]
    turned = x.clone()
    for t, position in enumerate(positions):
        for c in range(half):
            one, two = (2 * c, 2 * c + 1) if interleaved else (c, c + half)
            a, b = x[t, :, one], x[t, :, two]
            turned[t, :, one] = a * cos[position, c] - b * sin[position, c]
            turned[t, :, two] = a * sin[position, c] + b * cos[position, c]
    return turned


def kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    *,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    rotary_seqlens=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    rotary_interleaved=True,
    alibi_slopes=None,
    **how,
):
    """q (B, Sq, H, D), k and v (B, S_new, Hkv, D), caches (B_cache, S_cache, Hkv, D).

    With block_table the caches are pages, (num_blocks, page_size, Hkv, D); cache_batch_idx says which row of it, as it
    says which row of other caches. New keys go to the positions cache_seqlens, cache_seqlens + 1, ... and turn by them,
    or from rotary_seqlens on. Queries turn by those positions too if the mask is causal, a window or a chunk, and all
    by the first of them if not. The keys of a sequence begin at cache_leftpad.
    """
    rules = _rules(**how)
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    batch, seqlen_new = q.shape[0], 0 if k is None else k.shape[1]
    local = rules["causal"] or tuple(int(w) for w in rules["window_size"]) != (-1, -1) or rules["attention_chunk"] > 0
    outs, lses = [], []
    for b in range(batch):
        length = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
        if cache_seqlens is not None:
            length = int(cache_seqlens) if isinstance(cache_seqlens, int) else int(cache_seqlens[b])
        slot = b if cache_batch_idx is None else int(cache_batch_idx[b])
        pages = None if block_table is None else block_table[slot]
        q_b = q[b]
        if k is not None:
            k_b = k[b]
            if rotary_cos is not None:
                turn = length if rotary_seqlens is None else int(rotary_seqlens[b])
                k_b = rotate(k_b, rotary_cos, rotary_sin, range(turn, turn + seqlen_new), rotary_interleaved)
                positions = [turn + (i if local else 0) for i in range(q.shape[1])]
                q_b = rotate(q_b, rotary_cos, rotary_sin, positions, rotary_interleaved)
            for t, position in enumerate(range(length, length + seqlen_new)):
                if pages is None:
                    where = (slot, position)
                else:
                    where = (int(pages[position // k_cache.shape[1]]), position % k_cache.shape[1])
                k_cache[where], v_cache[where] = k_b[t], v[b, t]
        begin = 0 if cache_leftpad is None else int(cache_leftpad[b])
        end = length + seqlen_new
        if pages is None:
            keys, values = k_cache[slot, begin:end], v_cache[slot, begin:end]
        else:
            keys, values = gather_pages(k_cache, pages, end)[begin:], gather_pages(v_cache, pages, end)[begin:]
        out, lse, _ = one_sequence(
            q_b,
            keys,
            values,
            slopes=_slopes_of(alibi_slopes, b),
            keep=None,
            qv=None if qv is None else qv[b],
            **rules,
        )
        outs.append(out)
        lses.append(lse)
    return Cached(torch.stack(outs), torch.stack(lses), k_cache, v_cache)
