"""Attention against a key-value cache: the plan that follows from a call, and what the plan does.

`describe` checks a call and derives the plan, without writing anything; `run` then rotates, appends in place and
attends. Lengths and indices stay on the device. Values are checked where the host can read them for free.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch

from .. import checks, dispatch
from ..lengths import Lengths, Rows, check_pages, used
from ..problem import AttentionProblem, Result, with_qv
from ..tiers.metal.rotary import NewKeys, Queries, Rotary
from .cache_append import prepare
from .cache_call import NAMES, CacheCall
from .cache_codes import check_descales, kv_dtype

_Q = "batch, seqlen_q, heads, head_dim"
_Q_PACKED = "total_q, heads, head_dim with cu_seqlens_q"
_CACHE = "batch, seqlen, heads_k, head_dim"
_PAGES = "num_blocks, block_size, heads_k, head_dim"
_NAMES = {caller: {"k": names["k_cache"], "v": names["v_cache"]} for caller, names in NAMES.items()}


class CachePlan(NamedTuple):
    """What a call comes to: everything is checked, nothing is written yet."""

    call: CacheCall
    problem: (
        AttentionProblem  # over the cache as it will be; its queries, if rotated, and seqused_k are yet to be filled
    )
    new: NewKeys | None
    rotary: Rotary | None
    queries: Queries | None  # to rotate, if any are


def describe(call: CacheCall) -> CachePlan:
    """The plan of a call.

    Raises ValueError for a malformed call, NotImplementedError for one that is not served; both name the argument.
    """
    q, k_cache, v_cache = call.q, call.k_cache, call.v_cache
    if call.cu_seqlens_q is not None:  # before it is held against q that it is not packed, or against k_cache
        checks.tensor(call.cu_seqlens_q, "cu_seqlens_q", "batch + 1,")
    kv_dims = _CACHE
    if call.block_table is not None:
        name = call.names["block_table"]
        checks.tensor(call.block_table, name, "batch, blocks per sequence")
        kv_dims = f"{_PAGES} with {name}"
    codes = kv_dtype(call)
    dims = (_Q if call.cu_seqlens_q is None else _Q_PACKED, kv_dims)
    checks.qkv(q, k_cache, v_cache, dims, _NAMES[call.caller], codes)
    if call.cu_seqlens_q is None:
        queries, batch = Lengths(q.shape[1]), q.shape[0]
    else:
        queries, batch = _packed_queries(call, call.cu_seqlens_q), call.cu_seqlens_q.shape[0] - 1
    _check_entries(call, batch)
    if codes is not None:
        check_descales(call, batch)
    room = k_cache.shape[1] * (1 if call.block_table is None else call.block_table.shape[1])
    cached = _cached(call, batch, room)
    leftpad = None
    if call.cache_leftpad is not None:
        leftpad = _leftpad(call.cache_leftpad, call, batch, room, cached)
    new, of_new = _new(call, batch, room, cached)
    rotary, rotated = _rotary(call, batch, queries, cached, of_new)
    if call.seqused_q is not None:
        queries = used(queries, call.seqused_q, "seqused_q", batch, q, call.lengths_of_q)
    problem = _problem(call, batch, room, queries, cached, of_new, leftpad)
    if new is not None:
        new = new._replace(seqused_k=problem.seqused_k)
    if rotated is not None:
        problem.q = rotated.out
    if call.qv is not None:
        checks.qv(call.qv, problem.out_shape, q)
    return CachePlan(call, problem, new, rotary, rotated)


def run(plan: CachePlan) -> Result:
    """Rotate the queries and the new keys, append the new keys and values to the caches, and attend.

    Computes at once and without gradients: whether there is a graph or a gradient is `kvcache.attention`'s business.
    """
    call, problem, new, rotary, queries = plan
    if new is not None:
        prepare(new, rotary, queries)
    if call.qv is not None:
        problem = with_qv(problem, call.qv, call.options.softmax_scale)
    return dispatch.attention(problem)


def _packed_queries(call: CacheCall, cu_seqlens: torch.Tensor) -> Lengths:
    known = checks.cu_seqlens(cu_seqlens, "cu_seqlens_q", call.q.shape[0], "q", call.q)
    longest, tensor = checks.max_seqlen(call.max_seqlen_q, "max_seqlen_q", known, call.q.shape[0])
    return Lengths(longest, tensor, known)


def _check_entries(call: CacheCall, batch: int) -> None:
    """Is there an entry of the cache, or a row of the block table, for each sequence?"""
    k_cache, block_table, entries = call.k_cache, call.block_table, call.cache_batch_idx
    if block_table is not None:
        dims = (
            f"batch of {call.lengths_of_q}, blocks per sequence" if entries is None else "entries, blocks per sequence"
        )
        checks.int32(block_table, call.names["block_table"], dims, batch if entries is None else None, call.q)
    elif entries is None and k_cache.shape[0] != batch:
        accepted = (
            f"a batch of {batch}, that of q, without {call.names['cache_batch_idx']} or {call.names['block_table']}"
        )
        raise checks.malformed(call.names["k_cache"], k_cache, accepted)
    if entries is None:
        return
    name = call.names["cache_batch_idx"]
    checks.int32(entries, name, "batch,", batch, call.q)
    if block_table is None:
        checks.indices(entries, name, k_cache.shape[0], f"the entries of {call.names['k_cache']}")
    else:
        checks.indices(entries, name, block_table.shape[0], f"the rows of {call.names['block_table']}")


def _cached(call: CacheCall, batch: int, room: int) -> Rows:
    """The rows that are in the cache before the new ones."""
    seqlens = call.cache_seqlens
    if seqlens is None:
        return Rows(room, [room] * batch)
    names = call.names
    name, room_of = names["cache_seqlens"], names["k_cache" if call.block_table is None else "block_table"]
    if isinstance(seqlens, torch.Tensor) and seqlens.dim() > 0:
        return Rows(seqlens, checks.lengths(seqlens, name, batch, room, call.q, room_of))
    accepted = f"None, an integer or a (batch,) int32 tensor, between 0 and {room}, the room of {room_of}"
    number = checks.integer(seqlens, name, accepted)
    if not 0 <= number <= room:
        raise checks.malformed(name, seqlens, accepted)
    return Rows(number, [number] * batch)


def _leftpad(leftpad: torch.Tensor, call: CacheCall, batch: int, room: int, cached: Rows) -> Rows:
    """The rows of the cache in front of each sequence."""
    name = call.names["cache_leftpad"]
    known = checks.lengths(leftpad, name, batch, room, call.q, call.names["k_cache"])
    if known and cached.known and any(a > b for a, b in zip(known, cached.known, strict=True)):
        raise checks.malformed(name, known, f"at most {call.names['cache_seqlens']}, {cached.known}")
    return Rows(leftpad, known)


def _new(call: CacheCall, batch: int, room: int, cached: Rows) -> tuple[NewKeys | None, Rows | None]:
    """The rows that the call appends, for which there is room, and how many each sequence gets."""
    cu_seqlens = call.cu_seqlens_k_new
    if call.k is None and call.v is None:
        if cu_seqlens is not None:
            raise checks.malformed("cu_seqlens_k_new", "new lengths without k and v", "None, or k and v too")
        return None, None
    names = k_name, v_name, seqlens_name = call.names["k"], call.names["v"], call.names["cache_seqlens"]
    for name, value in zip(names, (call.k, call.v, call.cache_seqlens), strict=True):
        if value is None:
            raise checks.malformed(name, "None", f"{', '.join(names)} together, to append to the cache")
    k, v = _new_tensor(call.k, "k", call.k_cache, call), _new_tensor(call.v, "v", call.v_cache, call)
    if cu_seqlens is None and k.shape[0] != batch:
        raise checks.malformed(k_name, k, f"a batch of {batch}, that of q")
    if v.shape[:-1] != k.shape[:-1]:
        raise checks.malformed(v_name, v, f"the shape of {k_name}, {tuple(k.shape)}, up to head_dim")
    if cu_seqlens is None:
        rows = Rows(k.shape[1], [k.shape[1]] * batch)
    else:
        known = checks.cu_seqlens(cu_seqlens, "cu_seqlens_k_new", k.shape[0], k_name, call.q)
        if cu_seqlens.shape[0] != batch + 1:
            raise checks.malformed("cu_seqlens_k_new", cu_seqlens, f"{batch + 1} values")
        rows = Rows(cu_seqlens, known)
        if known is not None:  # rows behind the last sequence are no sequence's
            k, v = k[: sum(known)], v[: sum(known)]
    longest = _longest(cached.known, rows.known)
    if longest > room:
        came = f"{longest} keys after appending to those of {seqlens_name}"
        raise checks.malformed(k_name, came, f"at most {room}, the room of {call.names['k_cache']}")
    new = NewKeys(
        k,
        v,
        call.k_cache,
        call.v_cache,
        cu_seqlens,
        cached.number,
        call.cache_batch_idx,
        call.block_table,
        call.cache_leftpad,
        k_descale=call.k_descale,
        v_descale=call.v_descale,
    )
    return new, rows


def _new_tensor(value: Any, field: str, cache: torch.Tensor, call: CacheCall) -> torch.Tensor:
    name, cache_name, dims = call.names[field], call.names[f"{field}_cache"], "batch, seqlen_new, heads_k, head_dim"
    if call.cu_seqlens_k_new is not None:
        checks.tensor(call.cu_seqlens_k_new, "cu_seqlens_k_new", "batch + 1,")
        dims = "total_k_new, heads_k, head_dim with cu_seqlens_k_new"
    checks.own_memory(cache, cache_name)
    tensor = checks.tensor(value, name, dims, call.q)
    if tensor.dtype != call.q.dtype:
        raise checks.malformed(name, f"dtype {tensor.dtype}", f"{call.q.dtype}, the dtype of q")
    if tensor.shape[-2:] != cache.shape[-2:]:
        raise checks.malformed(name, tensor, f"(heads, head_dim) = {tuple(cache.shape[-2:])} as {cache_name}")
    return tensor


def _longest(starts: list[int] | None, lengths: list[int] | None) -> int:
    """How far the farthest sequence reaches, as far as the host knows."""
    if not starts or not lengths:
        return 0
    return max((start + length for start, length in zip(starts, lengths, strict=True) if length), default=0)


def _rotary(
    call: CacheCall, batch: int, queries: Lengths, cached: Rows, of_new: Rows | None
) -> tuple[Rotary | None, Queries | None]:
    """How to rotate, with a table that reaches as far as the positions do, and the queries with memory for them."""
    q, seqlens = call.q, call.rotary_seqlens
    if call.rotary_cos is None:
        if call.rotary_sin is not None:
            raise checks.malformed("rotary_sin", "a table without rotary_cos", "None, or rotary_cos too")
        return None, None  # whatever rotary_seqlens is: upstream does not look at it either
    cos, sin = _table(call.rotary_cos, "rotary_cos", q), _table(call.rotary_sin, "rotary_sin", q)
    if sin.shape != cos.shape:
        raise checks.malformed("rotary_sin", sin, f"the shape of rotary_cos, {tuple(cos.shape)}")
    if not 0 < 2 * cos.shape[1] <= q.shape[-1]:
        raise checks.malformed("rotary_cos", cos, f"rotary_dim / 2 of at most {q.shape[-1] // 2}, half the head_dim")
    if of_new is None:
        accepted = f"{call.names['k']} and {call.names['v']} too"
        raise checks.malformed("rotary_cos", "rotary embedding without new keys", accepted)
    start = cached
    if seqlens is not None:
        start = Rows(
            seqlens, checks.lengths(seqlens, call.names["rotary_seqlens"], batch, cos.shape[0], q, "rotary_cos")
        )
    _check_table(cos, start, of_new.known, "keys")
    # Upstream's rule: without causal, window and chunk all queries have the position after the cache.
    window = checks.window(call.options.window_size, call.options.causal)
    advances = window != (-1, -1) or checks.attention_chunk(call.options.attention_chunk) > 0
    lengths = [q.shape[1]] * batch if call.cu_seqlens_q is None else queries.lengths
    if lengths is not None and not advances:
        lengths = [min(n, 1) for n in lengths]
    _check_table(cos, start, lengths, "queries")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return Rotary(cos, sin, call.rotary_interleaved, start.number), Queries(q, out, call.cu_seqlens_q, advances)


def _table(value: Any, name: str, q: torch.Tensor) -> torch.Tensor:
    table = checks.tensor(value, name, "seqlen_ro, rotary_dim / 2", q)
    if table.dtype != q.dtype:
        raise checks.malformed(name, f"dtype {table.dtype}", f"{q.dtype}, the dtype of q")
    return table


def _check_table(cos: torch.Tensor, start: Rows, lengths: list[int] | None, what: str) -> None:
    longest = _longest(start.known, lengths)
    if longest > cos.shape[0]:
        raise checks.malformed("rotary_cos", cos, f"at least {longest} positions, for the {what}")


def _problem(
    call: CacheCall,
    batch: int,
    room: int,
    queries: Lengths,
    cached: Rows,
    of_new: Rows | None,
    leftpad: Rows | None,
) -> AttentionProblem:
    """Attention over the cache with the new rows in it."""
    q, k, v, block_table = call.q, call.k_cache, call.v_cache, call.block_table
    number, known = cached
    if of_new is not None and known is not None:
        known = None if of_new.known is None else list(map(operator.add, known, of_new.known))
    if block_table is not None:
        first = None if leftpad is None else leftpad.known
        table = _table_of_sequences(block_table, call.cache_batch_idx)
        check_pages(table, k, known, call.names["cache_seqlens"], call.names["block_table"], first)
    if leftpad is not None and known is not None:
        known = None if leftpad.known is None else list(map(operator.sub, known, leftpad.known))
    numbers = [number, 0 if of_new is None else of_new.number, *(() if leftpad is None else (leftpad.number,))]
    lengths = [n for n in (*numbers, block_table) if isinstance(n, torch.Tensor)]
    seqused: Any = None
    if not lengths:
        # One length for all is a plain dense problem on a shorter view.
        room = sum(numbers)
        k, v, known = k[:, :room], v[:, :room], None
    elif of_new is not None:
        seqused = lengths[0].new_empty(batch)  # filled when the new rows are appended
    elif leftpad is not None:
        seqused = number - leftpad.number
    elif isinstance(number, torch.Tensor):
        seqused = number
    else:
        seqused = torch.full((batch,), number, dtype=torch.int32, device=q.device)
    max_seqlen_k = room if known is None else max(known, default=0)
    return AttentionProblem(
        q,
        k,
        v,
        batch,
        queries.max_seqlen,
        max_seqlen_k,
        **call.options.checked(q, batch),
        cu_seqlens_q=call.cu_seqlens_q,
        seqused_q=call.seqused_q,
        seqused_k=seqused,
        max_seqlen_q_tensor=queries.max_seqlen_tensor,
        block_table=block_table,
        kv_batch_idx=call.cache_batch_idx,
        leftpad_k=call.cache_leftpad,
        k_descale=call.k_descale,
        v_descale=call.v_descale,
        lengths_q=queries.lengths,
        lengths_k=known,
    )


def _table_of_sequences(block_table: torch.Tensor, entries: torch.Tensor | None) -> torch.Tensor:
    """`(batch, blocks per sequence)`, to be looked at where values can be read for free."""
    if entries is None or not checks.readable(block_table) or not checks.readable(entries):
        return block_table
    return block_table.index_select(0, entries)
