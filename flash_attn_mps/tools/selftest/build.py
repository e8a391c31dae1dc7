"""From a case to a problem on a device, and what the oracle says about it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from ... import philox
from ...problem import AttentionProblem
from . import oracle
from .cases import FEATURES, Case, Feature

_PAGE = 16
_UNUSED = 5  # rows of a packed sequence beyond those that seqused counts
_NAN = float("nan")
_SEED = 0x1234_5678_9ABC_DEF0  # of dropout


@dataclass
class Sequence:
    """Inputs of one sequence on the CPU, in the dtype of the case; slopes, sinks and mask in float32 or bool."""

    q: torch.Tensor
    k: torch.Tensor  # or codes, as v
    v: torch.Tensor
    slopes: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass
class Built:
    problem: AttentionProblem
    out: list[torch.Tensor]  # of each sequence, in float64
    lse: list[torch.Tensor]
    dout: torch.Tensor | None = None  # the gradient of the output, where gradients are to be computed
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # of the problem's tensors, in float64

    def of_sequences(self, out: torch.Tensor, lse: torch.Tensor | None) -> list[tuple]:
        """What a tier gave, in the form of `self.out` and `self.lse`."""
        p = self.problem
        if p.cu_seqlens_q is None:
            return [(out[b], None if lse is None else lse[b]) for b in range(p.batch)]
        starts = p.cu_seqlens_q.tolist()
        spans = [slice(*span) for span in itertools.pairwise(starts)]
        return [(out[span], None if lse is None else lse[:, span]) for span in spans]


def build(case: Case, device: torch.device | str, seed: int = 0) -> Built:
    """The call on `device`. Memory that no query may see holds NaN."""
    feature = FEATURES[case.feature]
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    heads, heads_k = feature.heads
    slopes = None
    if feature.alibi:
        slopes = randn(len(feature.lengths), heads).abs() / 4
        slopes = slopes[:1].expand_as(slopes) if feature.alibi == "heads" else slopes
    sinks = randn(heads) if feature.sinks else None
    scale = {"": case.head_dim**-0.5, "number": 0.15, "tensor": 0.125}[feature.scale]
    sequences = []
    for b, (seqlen_q, seqlen_k) in enumerate(feature.lengths):
        q, k = randn(seqlen_q, heads, case.head_dim).to(dtype), randn(seqlen_k, heads_k, case.head_dim).to(dtype)
        mask = None
        if feature.mask:
            mask = randn(heads, seqlen_q, seqlen_k)
        if mask is not None and feature.mask == "bool":
            mask = mask < 0.5
            mask[:, seqlen_q // 2] = False  # a query that sees nothing
        v = randn(seqlen_k, heads_k, case.head_dim_v).to(dtype)
        if feature.codes:
            k, v = _codes(k, feature.codes), _codes(v, feature.codes)
        sequences.append(Sequence(q, k, v, None if slopes is None else slopes[b], mask))
    descales = {}
    if feature.codes:
        unit = 1 / 32 if feature.codes == "int8" else 1.0
        shape = len(sequences), heads_k
        descales = {f"{x}_descale": unit * torch.rand(shape, generator=generator).add_(0.5) for x in "kv"}
    left, right = feature.window[0], 0 if feature.causal else feature.window[1]
    of_sinks = None if sinks is None else sinks.double().requires_grad_(feature.gradients)
    masks = [s.mask for s in sequences]
    if feature.mask == "float" and feature.gradients:
        masks = [None if mask is None else mask.double().requires_grad_() for mask in masks]
    leaves = []
    for b, s in enumerate(sequences):
        k, v = (
            _values(x, descales[f"{name}_descale"][b]) if descales else x.double()
            for name, x in zip("kv", (s.k, s.v), strict=True)
        )
        leaves.append([x.requires_grad_(feature.gradients) for x in (s.q.double(), k, v)])
    exact = [
        oracle.attention(
            *leaves[b],
            scale=scale,
            left=left,
            right=right,
            softcap=feature.softcap,
            slopes=s.slopes,
            sinks=of_sinks,
            mask=masks[b],
            keep=_kept(feature, b) if feature.dropout else None,
            dropout_p=feature.dropout,
        )
        for b, s in enumerate(sequences)
    ]
    tensors: dict[str, Any] = {
        **_laid_out(sequences, feature, generator),
        **descales,
        "alibi_slopes": slopes[0] if slopes is not None and feature.alibi == "heads" else slopes,
        "sinks": sinks,
        "mask": torch.stack([s.mask for s in sequences if s.mask is not None]) if feature.mask else None,
        "softmax_scale": torch.tensor(scale) if feature.scale == "tensor" else None,
    }
    for name in ("q", "k", "v"):
        tensors[name] = _strided(tensors[name].to(device), feature.strides)
    moved = {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None and name not in "qkv"}
    unused = _UNUSED if feature.layout == "packed and used" else 0
    p = AttentionProblem(
        **{name: tensors[name] for name in "qkv"},
        **{"softmax_scale": scale, **moved},
        batch=len(sequences),
        max_seqlen_q=max(q for q, _ in feature.lengths) + unused,
        max_seqlen_k=max(k for _, k in feature.lengths) + unused,
        window_left=left,
        window_right=right,
        softcap=feature.softcap,
        dropout_p=feature.dropout,
        seed=_SEED if feature.dropout else 0,
        want_lse=feature.want_lse,
        needs_grad=feature.gradients,
    )
    built = Built(
        p,
        [_lengthened(out.detach(), unused, 0.0) for out, _ in exact],
        # Rows past the end see nothing.
        [_lengthened(lse.detach().T, unused, -torch.inf).T for _, lse in exact],
    )
    if feature.gradients:
        joined = torch.cat if feature.layout.startswith("packed") else torch.stack
        douts = [randn(*out.shape).to(dtype) for out, _ in exact]
        built.dout = joined([_lengthened(x, unused, 1.0) for x in douts]).to(device)
        for (out, _), dout in zip(exact, douts, strict=True):
            out.backward(dout.double())
        for name, rows in zip("qkv", zip(*leaves, strict=True), strict=True):
            built.gradients[name] = joined([_lengthened(_gradient_of(x), unused, 0.0) for x in rows])
        if of_sinks is not None:
            built.gradients["sinks"] = _gradient_of(of_sinks)
        of_masks = [_gradient_of(mask) for mask in masks if mask is not None and mask.requires_grad]
        if of_masks:
            built.gradients["mask"] = torch.stack(of_masks)
    return built


def _gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _kept(feature: Feature, sequence: int) -> torch.Tensor:
    """What dropout keeps of the scores of a sequence: `(heads, seqlen_q, seqlen_k)`."""
    (seqlen_q, seqlen_k), heads = feature.lengths[sequence], feature.heads[0]
    indices = sequence * heads + torch.arange(heads)
    return philox.keep(_SEED, feature.dropout, indices, (0, seqlen_q), (0, seqlen_k))


def _codes(x: torch.Tensor, codes: str) -> torch.Tensor:
    if codes == "int8":
        return (x.float() * 32).round().clamp(-128, 127).to(torch.int8)
    return x.to(torch.float8_e4m3fn).view(torch.uint8)


def _values(codes: torch.Tensor, descale: torch.Tensor) -> torch.Tensor:
    """What codes `(rows, heads, dim)` stand for, in float64."""
    floats = codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes
    return floats.double() * descale.double()[:, None]


def _laid_out(sequences: list[Sequence], feature: Feature, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """q, k, v and the tensors of lengths and indices that go with `feature.layout`."""
    if feature.layout in ("packed", "packed and used"):
        unused = _UNUSED if feature.layout == "packed and used" else 0
        counts = {"q": [q for q, _ in feature.lengths], "k": [k for _, k in feature.lengths]}
        spans = {f"cu_seqlens_{x}": _cumulative([n + unused for n in of_x]) for x, of_x in counts.items()}
        used = {f"seqused_{x}": torch.tensor(of_x, dtype=torch.int32) for x, of_x in counts.items() if unused}
        joined = {x: torch.cat([_lengthened(getattr(s, x), unused, _NAN) for s in sequences]) for x in "qkv"}
        return {**joined, **spans, **used}
    q = torch.stack([s.q for s in sequences])
    keys, values = [s.k for s in sequences], [s.v for s in sequences]
    if feature.layout == "dense":
        return {"q": q, "k": torch.stack(keys), "v": torch.stack(values)}
    lengths = torch.tensor([k for _, k in feature.lengths], dtype=torch.int32)
    if feature.layout == "indexed":  # the entries of the cache are in another order, and there is one too many
        order = torch.randperm(len(sequences) + 1, generator=generator)[: len(sequences)]
        k, v = (_poisoned(x, len(sequences) + 1) for x in (keys, values))
        for b, entry in enumerate(order.tolist()):
            k[entry, : len(keys[b])], v[entry, : len(keys[b])] = keys[b], values[b]
        return {"q": q, "k": k, "v": v, "kv_batch_idx": order.int(), "seqused_k": lengths}
    if feature.layout == "paged":
        return {"q": q, "seqused_k": lengths, **_paged(keys, values, generator)}
    pads = [3 + 2 * b if feature.layout == "leftpad" else 0 for b in range(len(sequences))]
    k, v = (_poisoned(x, len(sequences), max(pads)) for x in (keys, values))
    for b, pad in enumerate(pads):
        k[b, pad : pad + len(keys[b])], v[b, pad : pad + len(keys[b])] = keys[b], values[b]
    found = {"q": q, "k": k, "v": v, "seqused_k": lengths}
    return {**found, "leftpad_k": torch.tensor(pads, dtype=torch.int32)} if any(pads) else found


def _poisoned(rows: list[torch.Tensor], entries: int, more: int = 0) -> torch.Tensor:
    return torch.full((entries, max(map(len, rows)) + more, *rows[0].shape[1:]), _NAN, dtype=rows[0].dtype)


def _paged(keys: list[torch.Tensor], values: list[torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    blocks = [-(-len(k) // _PAGE) for k in keys]
    order = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
    table = torch.zeros(len(keys), max(blocks), dtype=torch.int32)
    k, v = (torch.full((len(order), _PAGE, *x[0].shape[1:]), _NAN, dtype=x[0].dtype) for x in (keys, values))
    for b, count in enumerate(blocks):
        for block in range(count):
            page = table[b, block] = order.pop()
            rows = slice(block * _PAGE, (block + 1) * _PAGE)
            k[page, : len(keys[b][rows])], v[page, : len(keys[b][rows])] = keys[b][rows], values[b][rows]
    return {"k": k, "v": v, "block_table": table}


def _lengthened(rows: torch.Tensor, more: int, value: float) -> torch.Tensor:
    return torch.cat([rows, rows.new_full((more, *rows.shape[1:]), value)])


def _cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def _strided(x: torch.Tensor, strides: str) -> torch.Tensor:
    if strides == "heads first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if strides == "gaps":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), _NAN if x.is_floating_point() else 127)
        wide[..., 3 : 3 + x.shape[-1]] = x
        return wide[..., 3 : 3 + x.shape[-1]]
    if strides == "last":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), _NAN)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x
