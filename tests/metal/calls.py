"""Attention calls as a kernel gets them, and what the oracle says of them.

A call is drawn as values, `(entries, rows, heads, head_dim)` for each of q, k and v, and a list of sequences that says
which of those rows count. From the same values come the memory that the kernel reads, in some layout and with NaN or
Inf wherever no query may look, and the clean sequences that the oracle reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from flash_attn_mps.problem import AttentionProblem, Result
from tests.attention import oracle, philox
from tests.attention.layouts import laid_out
from tests.attention.rule import assert_accumulated_in_fp32, assert_lse, assert_within_rule

STORAGES = ("dense", "varlen", "varlen-used", "cache", "packed-cache", "paged", "paged-cache")
_PACKED_Q = ("varlen", "varlen-used", "packed-cache", "paged")
SEED = (123 << 40) + 77  # of dropout: both words of it count
_SLACK = 3  # rows of memory that a sequence does not use, where there are such


@dataclass
class Spec:
    """What to draw. `lengths`: (queries, keys) of each sequence; dense ones have the same.

    `storage`: one of STORAGES, or "dense-used": dense with `seqused_k`.
    """

    lengths: list[tuple[int, int]]
    dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.float16
    storage: str = "dense"
    heads: tuple[int, int] = (4, 2)
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str | None = None  # "H", "BH"
    sinks: bool = False
    mask: str | torch.Tensor | None = None  # "bool", "same" (the dtype of q), "float32"; or the mask itself
    broadcast: str = ""  # the axes of the mask, of "bhqk", that have stride 0
    mask_layout: str = "columns"  # or "rows", of 16 elements times some, or "offset", rows of any length at any place
    scale: float | torch.Tensor | None = None
    lse: bool = True
    layout: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    poison: float = math.nan
    page_size: int = 16
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of q, k and v
    dropout_p: float = 0.0
    codes: torch.dtype | None = None  # of k and v where they are quantised
    descales: str = "both"  # which of them has one: "both", "k", "v", "" or "one" number for all


@dataclass
class Sequence:
    """One sequence as the oracle reads it: q (sq, H, D), k (sk, Hkv, D), v (sk, Hkv, Dv); its place in the output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    place: tuple  # of its queries in out; (entry, rows) or (rows,)
    place_k: tuple  # of its keys in k and v
    how: dict = field(default_factory=dict)


@dataclass
class Call:
    problem: AttentionProblem
    sequences: list[Sequence]

    def expected(self, dtype: torch.dtype) -> Result:
        """The oracle's output and log-sum-exp, computed in `dtype`."""
        p = self.problem
        out = torch.zeros(p.out_shape, dtype=dtype)
        lse = torch.full((*out.shape[:-2], p.heads), -math.inf, dtype=dtype)
        for s in self.sequences:
            out[s.place], of_sequence, _ = oracle.one_sequence(s.q.to(dtype), s.k.to(dtype), s.v.to(dtype), **s.how)
            lse[s.place] = of_sequence.T
        return Result(out, lse.transpose(-1, -2))

    def check(self, result: Result) -> None:
        p = self.problem
        exact, plain = self.expected(torch.float64), self.expected(p.q.dtype)
        assert result.out.is_contiguous()
        assert_within_rule("out", result.out, plain.out, exact.out)
        values = torch.cat([s.v.flatten() for s in self.sequences]).to(p.q.dtype)
        assert_accumulated_in_fp32(result.out, exact.out, values, p.dropout_p)
        assert (result.lse is not None) == p.want_lse
        if p.want_lse:
            assert_lse(result.lse, exact.lse)


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def draw(spec: Spec) -> Call:
    """The call of `spec`, its numbers from torch's generator."""
    batch = len(spec.lengths)
    (heads, heads_k), (dim, dim_v) = spec.heads, spec.dims
    lengths_q, lengths_k = ([n[i] for n in spec.lengths] for i in (0, 1))
    packed_q = spec.storage in _PACKED_Q
    extra: dict = {}

    # Rows of memory of each sequence's queries and keys: (entry, row) of q and of k, in order.
    if packed_q:
        room = [n + _SLACK * (spec.storage == "varlen-used") for n in lengths_q]
        extra["cu_seqlens_q"] = cumulative(room)
        places_q = [(slice(start, start + n),) for start, n in zip(cumulative(room).tolist(), lengths_q, strict=False)]
        q_shape = (sum(room), heads, dim)
        if spec.storage == "varlen-used":
            extra["seqused_q"] = int32(lengths_q)
    else:
        places_q = [(b, slice(0, n)) for b, n in enumerate(lengths_q)]
        q_shape = (batch, max(lengths_q), heads, dim)
    kv_shape, places_k, max_seqlen_k = _keys(spec, lengths_k, extra)

    q = _values((*q_shape,), spec.layout[0], spec.dtype, spec.std[0])
    k = _values((*kv_shape, heads_k, dim), spec.layout[1], spec.dtype, spec.std[1])
    v = _values((*kv_shape, heads_k, dim_v), spec.layout[2], spec.dtype, spec.std[2])
    poison = spec.poison
    if spec.codes is not None:
        (k, v), poison = (as_codes(x, spec.codes) for x in (k, v)), 127  # which is NaN in both floats
        extra |= _descales(spec, batch, heads_k)
    mask = _mask(spec, batch, heads, max(lengths_q), max_seqlen_k)
    slopes = 2.0 ** -(1 + torch.arange(batch * heads).float() % 7)
    slopes = {None: None, "H": slopes[:heads], "BH": slopes.view(batch, heads)}[spec.alibi]
    sinks = torch.randn(heads) if spec.sinks else None

    keep = None
    if spec.dropout_p:
        keep = philox.keep(SEED, spec.dropout_p, batch, heads, max(lengths_q), max(lengths_k))
    sequences = []
    read = torch.zeros(kv_shape, dtype=torch.bool)
    for b, (place_q, place_k) in enumerate(zip(places_q, places_k, strict=True)):
        how = {
            "softmax_scale": spec.scale,
            "window_size": spec.window,
            "softcap": spec.softcap,
            "slopes": None if slopes is None else slopes.view(-1, heads)[b if spec.alibi == "BH" else 0],
            "mask": None if mask is None else mask[b, :, : lengths_q[b], : lengths_k[b]],
            "sinks": sinks,
            "dropout_p": spec.dropout_p,
            "keep": None if keep is None else keep[b, :, : lengths_q[b], : lengths_k[b]],
        }
        k_rows, v_rows = k[place_k], v[place_k]
        if spec.codes is not None:
            k_rows, v_rows = (
                x.view(spec.codes).double() * (1.0 if extra.get(name) is None else extra[name][b, :, None].double())
                for x, name in ((k_rows, "k_descale"), (v_rows, "v_descale"))
            )
        sequences.append(Sequence(q[place_q], k_rows, v_rows, place_q, place_k, how))
        seen = _seen(spec, lengths_q[b], lengths_k[b], how["mask"])
        index = torch.arange(read.numel()).view(read.shape)[place_k]
        read.view(-1)[index[seen]] = True

    q_read = torch.zeros(q_shape[:-2], dtype=torch.bool)
    for place in places_q:
        q_read[place] = True
    k, v = (_poisoned(x, read, layout, poison) for x, layout in ((k, spec.layout[1]), (v, spec.layout[2])))
    if spec.codes is not None:
        k, v = k.view(spec.codes), v.view(spec.codes)
    problem = AttentionProblem(
        _poisoned(q, q_read, spec.layout[0], spec.poison),
        k,
        v,
        batch,
        max(lengths_q),
        max_seqlen_k,
        dim**-0.5 if spec.scale is None else spec.scale,
        window_left=spec.window[0],
        window_right=spec.window[1],
        softcap=spec.softcap,
        alibi_slopes=slopes,
        dropout_p=spec.dropout_p,
        seed=SEED if spec.dropout_p else 0,
        want_lse=spec.lse,
        mask=None if mask is None else unexpanded(mask),
        sinks=sinks,
        **extra,
    )
    return Call(problem, sequences)


def _keys(spec: Spec, lengths: list[int], extra: dict) -> tuple[tuple[int, int] | tuple[int], list[tuple], int]:
    """The shape of the rows of k and v, where the rows of each sequence are, and the most keys that one may have."""
    batch, storage = len(lengths), spec.storage
    longest = max(lengths)
    if storage == "dense":
        return (batch, longest), [(b, slice(0, n)) for b, n in enumerate(lengths)], longest
    if storage == "dense-used":
        extra["seqused_k"] = int32(lengths)
        room = longest + _SLACK
        return (batch, room), [(b, slice(0, n)) for b, n in enumerate(lengths)], room
    if storage in ("varlen", "varlen-used"):
        room = [n + _SLACK * (storage == "varlen-used") for n in lengths]
        starts = extra["cu_seqlens_k"] = cumulative(room)
        if storage == "varlen-used":
            extra["seqused_k"] = int32(lengths)
        places = [(slice(start, start + n),) for start, n in zip(starts.tolist(), lengths, strict=False)]
        return (sum(room),), places, max(room)
    if storage in ("cache", "packed-cache"):
        entries, pads = [batch - b for b in range(batch)], [b % 3 for b in range(batch)]
        extra |= {"seqused_k": int32(lengths), "kv_batch_idx": int32(entries), "leftpad_k": int32(pads)}
        places = [(e, slice(pad, pad + n)) for e, pad, n in zip(entries, pads, lengths, strict=True)]
        return (batch + 1, longest + _SLACK), places, longest
    # Pages in a shuffled order. Table entries that no key is on may hold anything.
    blocks = [-(-n // spec.page_size) for n in lengths]
    order = torch.randperm(sum(blocks) + 2).tolist()
    table = torch.full((batch, max(*blocks, 1) + 1), 1 << 30, dtype=torch.int32)
    places = []
    for b, n in enumerate(lengths):
        pages = [order.pop() for _ in range(blocks[b])]
        table[b, : blocks[b]] = int32(pages)
        rows = torch.arange(n)
        places.append((torch.tensor(pages, dtype=torch.long)[rows // spec.page_size], rows % spec.page_size))
    extra["block_table"] = table
    if storage == "paged":
        extra["cu_seqlens_k"] = cumulative(lengths)
    else:
        extra["seqused_k"] = int32(lengths)
    return (sum(blocks) + 2, spec.page_size), places, longest


def _values(shape: tuple[int, ...], layout: str, dtype: torch.dtype, std: float) -> torch.Tensor:
    """Random values; those that an expanded layout can hold."""
    x = torch.randn(shape).mul_(std).to(dtype)
    return laid_out(x, layout).clone() if layout == "expanded" else x


def as_codes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The codes of values of about 1, as uint8: by torch, not by the product."""
    if dtype == torch.int8:
        return (x.float() * 30).round().clamp(-128, 127).to(dtype).view(torch.uint8)
    return x.to(dtype).view(torch.uint8)


def _descales(spec: Spec, batch: int, heads_k: int) -> dict[str, torch.Tensor]:
    unit = 1 / 30 if spec.codes == torch.int8 else 1.0
    if spec.descales == "one":
        return dict.fromkeys(("k_descale", "v_descale"), torch.tensor(unit).expand(batch, heads_k))
    drawn = {f"{name}_descale": unit * (0.5 + torch.rand(heads_k, batch).T) for name in "kv"}  # strides of any kind
    return {name: x for name, x in drawn.items() if spec.descales == "both" or name[0] == spec.descales}


def _poisoned(x: torch.Tensor, read: torch.Tensor, layout: str, poison: float) -> torch.Tensor:
    """x in the memory that `layout` names, with `poison` in rows that nobody may read."""
    if layout != "expanded":  # there a row is many
        x = x.masked_fill(~read[..., None, None], poison)
    return laid_out(x, layout)


def _seen(spec: Spec, seqlen_q: int, seqlen_k: int, mask: torch.Tensor | None) -> torch.Tensor:
    """(seqlen_k,): which keys some query sees."""
    distance = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q) - torch.arange(seqlen_k)
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if spec.window[0] >= 0:
        seen &= distance <= spec.window[0]
    if spec.window[1] >= 0:
        seen &= -distance <= spec.window[1]
    if mask is not None:
        seen = (seen & (mask if mask.dtype == torch.bool else mask > -math.inf)).any(0)
    return seen.any(0)


def _mask(spec: Spec, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> torch.Tensor | None:
    """(batch, heads, seqlen_q, seqlen_k), with rows and columns that see or show nothing."""
    if spec.mask is None or isinstance(spec.mask, torch.Tensor):
        return spec.mask if spec.mask is None else spec.mask.expand(batch, heads, seqlen_q, seqlen_k)
    full = dict(zip("bhqk", (batch, heads, seqlen_q, seqlen_k), strict=True))
    shape = [1 if axis in spec.broadcast else n for axis, n in full.items()]
    shown = torch.rand(shape) > 0.3
    if "k" not in spec.broadcast:
        shown[..., 2::5] = False
    if "q" not in spec.broadcast:
        shown[..., 1::4, :] = False
    if spec.mask == "bool":
        mask = shown
    else:
        dtype = spec.dtype if spec.mask == "same" else torch.float32
        mask = torch.randn(shape).to(dtype).masked_fill_(~shown, -math.inf)
    return arranged(mask, spec.mask_layout).expand(*full.values())


def unexpanded(mask: torch.Tensor) -> torch.Tensor:
    """In its own shape: 1 where it is broadcast."""
    return mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]


def arranged(mask: torch.Tensor, layout: str) -> torch.Tensor:
    """`mask` (b, h, q, k) in the memory that `layout` names."""
    if layout == "columns":
        return mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "rows":
        wide = torch.ones(*mask.shape[:3], -(-mask.shape[3] // 16) * 16, dtype=mask.dtype)
        return wide[..., : mask.shape[3]].copy_(mask)
    return torch.ones(mask.numel() + 1, dtype=mask.dtype)[1:].view(mask.shape).copy_(mask)
