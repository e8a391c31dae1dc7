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
from ..tiers.metal.movement import NewKeys, Queries, Rotary
from .cache_append import prepare
from .cache_call import NAMES, CacheCall
from .cache_codes import check_descales, kv_dtype, may_be_quantised

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
    codes = kv_dtype(call) if may_be_quantised(call) else None
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
    options = call.options.checked(q, batch)
    rows = _new_rows(call, batch, room, cached)
    rotary, rotated = None, None
    if call.rotary_cos is not None or call.rotary_sin is not None:
        rotary, rotated = _rotary(call, batch, queries, cached, rows, options)
    if call.seqused_q is not None:
        queries = used(queries, call.seqused_q, "seqused_q", batch, q, call.lengths_of_q)
    problem = _problem(call, batch, room, queries, cached, rows, leftpad, options)
    if call.qv is not None:
        checks.qv(call.qv, problem.out_shape, q)
    if rotated is not None:
        problem.q = rotated.out
    new = None if rows is None else _new_keys(call, rows, cached, problem.seqused_k)
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


def _new_rows(call: CacheCall, batch: int, room: int, cached: Rows) -> Rows | None:
    """How many rows each sequence gets, for which there is room; the number is cu_seqlens_k_new if they are packed."""
    cu_seqlens, k, v = call.cu_seqlens_k_new, call.k, call.v
    if k is None and v is None:
        if cu_seqlens is not None:
            raise checks.malformed("cu_seqlens_k_new", "new lengths without k and v", "None, or k and v too")
        return None
    names = call.names
    if k is None or v is None or call.cache_seqlens is None:
        together = {names["k"]: k, names["v"]: v, names["cache_seqlens"]: call.cache_seqlens}
        missing = next(name for name, value in together.items() if value is None)
        raise checks.malformed(missing, "None", f"{', '.join(together)} together, to append to the cache")
    dims = "batch, seqlen_new, heads_k, head_dim"
    if cu_seqlens is not None:
        checks.tensor(cu_seqlens, "cu_seqlens_k_new", "batch + 1,")
        dims = "total_k_new, heads_k, head_dim with cu_seqlens_k_new"
    shape, v_shape = _new_shape(k, "k", call.k_cache, call, dims), _new_shape(v, "v", call.v_cache, call, dims)
    if cu_seqlens is None and shape[0] != batch:
        raise checks.malformed(names["k"], k, f"a batch of {batch}, that of q")
    if v_shape[:-1] != shape[:-1]:
        raise checks.malformed(names["v"], v, f"the shape of {names['k']}, {tuple(shape)}, up to head_dim")
    if cu_seqlens is None:
        rows = Rows(shape[1], [shape[1]] * batch)
    else:
        rows = Rows(cu_seqlens, checks.cu_seqlens(cu_seqlens, "cu_seqlens_k_new", shape[0], names["k"], call.q))
        if cu_seqlens.shape[0] != batch + 1:
            raise checks.malformed("cu_seqlens_k_new", cu_seqlens, f"{batch + 1} values")
    longest = _longest(cached.known, rows.known)
    if longest > room:
        came = f"{longest} keys after appending to those of {names['cache_seqlens']}"
        raise checks.malformed(names["k"], came, f"at most {room}, the room of {names['k_cache']}")
    return rows


def _new_shape(value: Any, field: str, cache: torch.Tensor, call: CacheCall, dims: str) -> torch.Size:
    names, q = call.names, call.q
    checks.own_memory(cache, names[f"{field}_cache"])
    tensor = checks.tensor(value, names[field], dims, q)
    if tensor.dtype is not q.dtype:
        raise checks.malformed(names[field], f"dtype {tensor.dtype}", f"{q.dtype}, the dtype of q")
    shape, cache_shape = tensor.shape, cache.shape
    if shape[-1] != cache_shape[-1] or shape[-2] != cache_shape[-2]:
        accepted = f"(heads, head_dim) = {tuple(cache_shape[-2:])} as {names[f'{field}_cache']}"
        raise checks.malformed(names[field], tensor, accepted)
    return shape


def _new_keys(call: CacheCall, rows: Rows, cached: Rows, seqused_k: torch.Tensor | None) -> NewKeys:
    k: Any = call.k
    v: Any = call.v
    if call.cu_seqlens_k_new is not None and rows.known is not None:  # rows behind the last sequence are no sequence's
        k, v = k[: sum(rows.known)], v[: sum(rows.known)]
    return NewKeys(
        k,
        v,
        call.k_cache,
        call.v_cache,
        call.cu_seqlens_k_new,
        cached.number,
        call.cache_batch_idx,
        call.block_table,
        call.cache_leftpad,
        seqused_k,
        call.k_descale,
        call.v_descale,
    )


def _longest(starts: list[int] | None, lengths: list[int] | None) -> int:
    """How far the farthest sequence reaches, as far as the host knows."""
    if not starts or not lengths:
        return 0
    return max((start + length for start, length in zip(starts, lengths, strict=True) if length), default=0)


def _rotary(
    call: CacheCall, batch: int, queries: Lengths, cached: Rows, of_new: Rows | None, options: dict[str, Any]
) -> tuple[Rotary, Queries]:
    """How to rotate, with a table that reaches as far as the positions do, and the queries with memory for them.

    Without tables it does not matter what rotary_seqlens is: upstream does not look at it either.
    """
    q, seqlens = call.q, call.rotary_seqlens
    if call.rotary_cos is None:
        raise checks.malformed("rotary_sin", "a table without rotary_cos", "None, or rotary_cos too")
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
    # Upstream's rule: without causal, window and chunk all queries have the position after the cache.
    advances = options["window_left"] >= 0 or options["window_right"] >= 0 or options["attention_chunk"] > 0
    if start.known is not None:
        lengths = [q.shape[1]] * batch if call.cu_seqlens_q is None else queries.lengths
        if lengths is not None and not advances:
            lengths = [min(n, 1) for n in lengths]
        _check_table(cos, start, of_new.known, "keys")
        _check_table(cos, start, lengths, "queries")
    out = q.new_empty(q.shape)
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
    options: dict[str, Any],
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
    of_new_rows = 0 if of_new is None else of_new.number
    of_lengths = next(
        (n for n in (number, of_new_rows, block_table) if isinstance(n, torch.Tensor)), call.cache_leftpad
    )
    seqused: Any = number
    if of_lengths is None:
        # One length for all is a plain dense problem on a shorter view.
        room = operator.add(number, of_new_rows)
        k, v, known, seqused = k[:, :room], v[:, :room], None, None
    elif of_new is not None:
        seqused = of_lengths.new_empty(batch)  # filled when the new rows are appended
    elif leftpad is not None:
        seqused = number - leftpad.number
    elif isinstance(number, int):
        seqused = torch.full((batch,), number, dtype=torch.int32, device=q.device)
    max_seqlen_k = room if known is None else max(known, default=0)
    return AttentionProblem(
        q,
        k,
        v,
        batch,
        queries.max_seqlen,
        max_seqlen_k,
        **options,
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
