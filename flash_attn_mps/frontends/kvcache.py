"""Attention against a key-value cache: rotate, append in place, describe the call. Shared by FlashAttention 2 and 3.

Lengths and indices stay on the device. Values are checked where the host can read them for free.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from .. import checks, dispatch
from ..describe import CallOptions
from ..graph import attention_op, kvcache_op
from ..lengths import check_pages
from ..problem import AttentionProblem, Result, with_qv
from .rotary import apply_rotary

_Q = "batch, seqlen_q, heads, head_dim"
_Q_PACKED = "total_q, heads, head_dim"
_CACHE = "batch, seqlen, heads_k, head_dim"
_PAGES = "num_blocks, block_size, heads_k, head_dim"
_NAMES = {"k": "k_cache", "v": "v_cache"}


def attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    options: CallOptions,
    *,
    k: Any = None,
    v: Any = None,
    qv: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = True,
    rotary_seqlens: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    block_table_name: str = "block_table",
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: Any = None,
) -> Result:
    """Append `k` and `v` to the caches, rotate them and `q`, and attend. Arguments as in `flash_attn_with_kvcache`.

    Not differentiable: the result's backward raises `NotImplementedError`.
    """
    given = (q, k_cache, v_cache, k, v, qv)  # before rotation under no_grad makes k another tensor
    if torch.compiler.is_compiling():
        named = {
            "k": k,
            "v": v,
            "qv": qv,
            "rotary_cos": rotary_cos,
            "rotary_sin": rotary_sin,
            "rotary_interleaved": rotary_interleaved,
            "rotary_seqlens": rotary_seqlens,
            "cache_seqlens": cache_seqlens,
            "cache_batch_idx": cache_batch_idx,
            "cache_leftpad": cache_leftpad,
            "block_table": block_table,
            "block_table_name": block_table_name,
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k_new": cu_seqlens_k_new,
            "max_seqlen_q": max_seqlen_q,
        }
        with torch.no_grad():
            result = _captured(q, k_cache, v_cache, options, **named)
        return _anchored(result, given)
    cache = _Cache(
        q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, block_table_name, cu_seqlens_q
    )
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        if k is not None or v is not None:
            cache.check_new(k, v, cu_seqlens_k_new)
        elif cu_seqlens_k_new is not None:
            raise checks.malformed("cu_seqlens_k_new", "new lengths without k and v", "None, or k and v too")
        max_seqlen_q = cache.check_queries(max_seqlen_q)
        rotated = q
        if rotary_cos is not None or rotary_sin is not None:
            moving = bool(options.causal) or checks.window(options.window_size, False) != (-1, -1)
            rotary = _Rotary(cache, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens)
            rotated = rotary.queries(max_seqlen_q, moving)
            k = rotary.keys(k)
        elif rotary_seqlens is not None:
            raise checks.malformed(
                "rotary_seqlens", "positions without rotary_cos and rotary_sin", "None, or all three"
            )
        p = cache.problem(rotated, max_seqlen_q, options)
        if k is not None:
            cache.append(k, v)
        if qv is not None:
            p = with_qv(p, qv, options.softmax_scale)
        result = dispatch.attention(p)
    return _anchored(result, given)


_captured = kvcache_op.register(attention)


def _anchored(result: Result, given: tuple[torch.Tensor | None, ...]) -> Result:
    """`result`, whose backward raises, if any of the tensors `given` requires a gradient."""
    if torch.is_grad_enabled():
        for tensor in given:
            if tensor is not None and tensor.requires_grad:
                result.out = _NoBackward.apply(result.out, tensor)
                break
    return result


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(anchor)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        # An operator, because a graph is made of the backward pass too, whether anybody runs it or not.
        reason = "flash_attn_with_kvcache has no backward pass: use flash_attn_func to train"
        return None, attention_op.no_gradient(dout, *ctx.saved_tensors, reason)


class _Cache:
    """A checked cache and what is known of its lengths."""

    def __init__(
        self,
        q: Any,
        k_cache: Any,
        v_cache: Any,
        seqlens: Any,
        batch_idx: Any,
        leftpad: Any,
        block_table: Any,
        block_table_name: str,
        cu_seqlens_q: Any,
    ) -> None:
        paged, packed = block_table is not None, cu_seqlens_q is not None
        checks.qkv(q, k_cache, v_cache, (_Q_PACKED if packed else _Q, _PAGES if paged else _CACHE), _NAMES)
        self.q, self.k, self.v = q, k_cache, v_cache
        self.cu_seqlens_q, self.lengths_q, self.max_seqlen_q_tensor = cu_seqlens_q, None, None
        if packed:
            self.lengths_q = checks.cu_seqlens(cu_seqlens_q, "cu_seqlens_q", q.shape[0], "q", q)
        self.batch = batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
        self.block_table, self.block_table_name = block_table, block_table_name
        self.new, self.cu_new, self.lengths_new = 0, None, None
        if paged:
            for name, value in (("cache_batch_idx", batch_idx), ("cache_leftpad", leftpad)):
                if value is not None:
                    raise checks.unsupported(name, f"with {block_table_name}", "None for a paged cache")
            checks.int32(block_table, block_table_name, "batch, blocks per sequence", batch, q)
            self.room = block_table.shape[1] * k_cache.shape[1]
        else:
            self.room = k_cache.shape[1]
            if batch_idx is None and k_cache.shape[0] != batch:
                raise checks.malformed("k_cache", k_cache, f"a batch of {batch}, that of q, without cache_batch_idx")
        self._check_seqlens(seqlens)
        self.batch_idx = batch_idx
        if batch_idx is not None:
            checks.int32(batch_idx, "cache_batch_idx", "batch,", batch, q)
            checks.indices(batch_idx, "cache_batch_idx", k_cache.shape[0], "the entries of k_cache")
        self._check_leftpad(leftpad)

    def _check_seqlens(self, seqlens: Any) -> None:
        """Sets `seqlens` (an int for all, or a tensor) and `lengths`, a list where the host can know them."""
        accepted = f"None, an integer or a (batch,) int32 tensor, between 0 and {self.room}"
        self.given = seqlens is not None
        if seqlens is None:
            self.seqlens: int | torch.Tensor = self.room
        elif isinstance(seqlens, torch.Tensor) and seqlens.dim() > 0:
            self.seqlens = seqlens
            self.lengths = checks.lengths(seqlens, "cache_seqlens", self.batch, self.room, self.q)
            return
        else:
            self.seqlens = checks.integer(seqlens, "cache_seqlens", accepted)
            if not 0 <= self.seqlens <= self.room:
                raise checks.malformed("cache_seqlens", seqlens, accepted)
        self.lengths = [self.seqlens] * self.batch

    def _check_leftpad(self, leftpad: Any) -> None:
        self.leftpad, self.leftpads = leftpad, [0] * self.batch
        if leftpad is None:
            return
        self.leftpads = checks.lengths(leftpad, "cache_leftpad", self.batch, self.room, self.q)
        if self.leftpads and self.lengths and any(a > b for a, b in zip(self.leftpads, self.lengths, strict=True)):
            raise checks.malformed("cache_leftpad", leftpad.tolist(), f"at most cache_seqlens, {self.lengths}")

    def check_queries(self, max_seqlen_q: Any) -> int:
        if self.cu_seqlens_q is None:
            return self.q.shape[1]
        longest, self.max_seqlen_q_tensor = checks.max_seqlen(
            max_seqlen_q, "max_seqlen_q", self.lengths_q, self.q.shape[0]
        )
        return longest

    def check_new(self, k: Any, v: Any, cu_seqlens_k_new: Any) -> None:
        for name, value in (("k", k), ("v", v), ("cache_seqlens", self.seqlens if self.given else None)):
            if value is None:
                raise checks.malformed(name, "None", "k, v and cache_seqlens together, to append to the cache")
        packed = cu_seqlens_k_new is not None
        dims = "total_k_new, heads_k, head_dim" if packed else "batch, seqlen_new, heads_k, head_dim"
        for name, value, cached in (("k", k, self.k), ("v", v, self.v)):
            checks.tensor(value, name, dims, self.q)
            if value.dtype != cached.dtype:
                raise checks.malformed(name, f"dtype {value.dtype}", f"{cached.dtype}, the dtype of {name}_cache")
            if value.shape[-2:] != cached.shape[-2:]:
                raise checks.malformed(name, value, f"(heads, head_dim) = {tuple(cached.shape[-2:])} as {name}_cache")
        if not packed and k.shape[0] != self.batch:
            raise checks.malformed("k", k, f"a batch of {self.batch}, that of q")
        if v.shape[:-1] != k.shape[:-1]:
            raise checks.malformed("v", v, f"the shape of k, {tuple(k.shape)}, up to head_dim")
        if packed:
            self.cu_new = cu_seqlens_k_new
            self.lengths_new = checks.cu_seqlens(cu_seqlens_k_new, "cu_seqlens_k_new", k.shape[0], "k", self.q)
            if cu_seqlens_k_new.shape[0] != self.batch + 1:
                raise checks.malformed("cu_seqlens_k_new", cu_seqlens_k_new, f"{self.batch + 1} values")
        else:
            self.new = k.shape[1]
            self.lengths_new = [self.new] * self.batch
        if self.lengths and self.lengths_new:
            longest = max(a + b for a, b in zip(self.lengths, self.lengths_new, strict=True))
            if longest > self.room:
                raise checks.malformed(
                    "k", f"{longest} keys after appending", f"at most {self.room}, the room of k_cache"
                )

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the new rows behind the cached ones, in place."""
        device = k.device
        if self.cu_new is None:
            entry, row = torch.arange(self.batch, device=device)[:, None], torch.arange(self.new, device=device)
        else:
            rows = torch.arange(k.shape[0], device=device)
            entry = torch.searchsorted(self.cu_new[1:], rows, right=True)
            row = rows - self.cu_new[entry]
        position = row + (self.seqlens if isinstance(self.seqlens, int) else self.seqlens[entry])
        if self.block_table is not None:
            block_size = self.k.shape[1]
            where = (self.block_table[entry, position // block_size], position % block_size)
        else:
            where = (entry if self.batch_idx is None else self.batch_idx[entry], position)
        self.k[where] = k
        self.v[where] = v

    def problem(self, q: torch.Tensor, max_seqlen_q: int, options: CallOptions) -> AttentionProblem:
        uniform = isinstance(self.seqlens, int) and self.cu_new is None
        k, v, seqused, lengths, longest = self.k, self.v, None, None, self.room
        if (
            self.lengths is not None
            and self.leftpads is not None
            and (self.cu_new is None or self.lengths_new is not None)
        ):
            new = self.lengths_new or [0] * self.batch
            lengths = [n + m - pad for n, m, pad in zip(self.lengths, new, self.leftpads, strict=True)]
            longest = max(lengths, default=0)
        if uniform and self.leftpad is None and self.block_table is None:
            # One length for all is a plain dense problem on a shorter view.
            longest = self.seqlens + self.new
            k, v, lengths = k[:, :longest], v[:, :longest], None
        else:
            seqused = self._seqused()
        if self.block_table is not None:
            check_pages(self.block_table, k, lengths, "cache_seqlens", self.block_table_name)
        return AttentionProblem(
            q,
            k,
            v,
            self.batch,
            max_seqlen_q,
            longest,
            **options.checked(q, self.batch),
            cu_seqlens_q=self.cu_seqlens_q,
            seqused_k=seqused,
            max_seqlen_q_tensor=self.max_seqlen_q_tensor,
            block_table=self.block_table,
            kv_batch_idx=self.batch_idx,
            leftpad_k=self.leftpad,
            lengths_q=self.lengths_q,
            lengths_k=lengths,
        )

    def _seqused(self) -> torch.Tensor:
        """`(batch,)` int32: the keys of each sequence, new ones included."""
        seqused = self.seqlens
        if isinstance(seqused, int):
            seqused = torch.full((self.batch,), seqused, dtype=torch.int32, device=self.q.device)
        new = self.new if self.cu_new is None else self.cu_new.diff()
        if self.leftpad is not None:
            new = new - self.leftpad
        return seqused if isinstance(new, int) and new == 0 else seqused + new


class _Rotary:
    """Rotary embedding of the queries and of the new keys, at their positions in the cache."""

    def __init__(self, cache: _Cache, cos: Any, sin: Any, interleaved: bool, seqlens: Any) -> None:
        q = cache.q
        for name, value in (("rotary_cos", cos), ("rotary_sin", sin)):
            checks.tensor(value, name, "seqlen_ro, rotary_dim / 2", q)
            if value.dtype != q.dtype:
                raise checks.malformed(name, f"dtype {value.dtype}", f"{q.dtype}, the dtype of q")
        if sin.shape != cos.shape:
            raise checks.malformed("rotary_sin", sin, f"the shape of rotary_cos, {tuple(cos.shape)}")
        if not 0 < 2 * cos.shape[1] <= q.shape[-1]:
            raise checks.malformed(
                "rotary_cos", cos, f"rotary_dim / 2 of at most {q.shape[-1] // 2}, half the head_dim"
            )
        if cache.lengths_new is None and cache.cu_new is None:
            raise checks.malformed("rotary_cos", "rotary embedding without k and v", "k and v too")
        self.cache, self.cos, self.sin, self.interleaved = cache, cos, sin, interleaved
        self.offsets, self.starts = cache.seqlens, cache.lengths
        if seqlens is not None:
            self.offsets = seqlens
            self.starts = checks.lengths(seqlens, "rotary_seqlens", cache.batch, cos.shape[0], q)
        self._check_room(cache.lengths_new, "keys")

    def _check_room(self, lengths: list[int] | None, what: str) -> None:
        """The table must reach as far as the rows, where the host can know that."""
        if self.starts and lengths:
            longest = max(a + b for a, b in zip(self.starts, lengths, strict=True))
            if longest > self.cos.shape[0]:
                raise checks.malformed("rotary_cos", self.cos, f"at least {longest} positions, for the {what}")

    def queries(self, max_seqlen_q: int, moving: bool) -> torch.Tensor:
        """Queries at consecutive positions; or, if neither causal nor local, all at the position after the cache."""
        q, packed = self.cache.q, self.cache.cu_seqlens_q
        if moving:
            self._check_room(self.cache.lengths_q or [max_seqlen_q] * self.cache.batch, "queries")
            return self._rotate(q, packed, max_seqlen_q)
        if packed is not None:
            raise checks.unsupported("cu_seqlens_q", "rotary embedding of packed queries without causal", "causal=True")
        return self._rotate(q.flatten(1, 2).unsqueeze(1), None, None).view(q.shape)

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        longest = None if self.cache.cu_new is None else k.shape[0]
        return self._rotate(k, self.cache.cu_new, longest)

    def _rotate(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int | None) -> torch.Tensor:
        return apply_rotary(
            x,
            self.cos,
            self.sin,
            seqlen_offsets=self.offsets,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            interleaved=self.interleaved,
        )
