"""What is timed: calls as programs make them, with their minimum of arithmetic and memory traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ... import quantised

KINDS = {
    "prefill": "a prompt, or an encoder",
    "decode": "a few queries against a cache: dense, in pages, quantised",
    "varlen": "packed sequences of mixed length",
    "window": "sliding-window attention",
    "training": "forward and backward, as a step of training needs them",
}
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


class Workload(NamedTuple):
    """`lengths`: queries and keys of each sequence; packed if `kind` is varlen or they differ, else all the same."""

    kind: str
    dtype: str
    head_dim: int
    heads: int
    heads_k: int
    lengths: tuple[tuple[int, int], ...]
    causal: bool = True
    window: int = -1  # keys to the left of a query; -1 is open
    page_size: int = 0  # keys and values are in pages of so many, which lie in no order
    codes: str = ""  # the dtype of quantised keys and values: "int8", or "uint8" for float8_e4m3fn

    @property
    def packed(self) -> bool:
        return self.kind == "varlen" or len(set(self.lengths)) > 1

    @property
    def training(self) -> bool:
        return self.kind == "training"

    @property
    def name(self) -> str:
        queries, keys = self.lengths[0]
        if self.packed:
            what = f"{len(self.lengths)} ragged, {sum(q for q, _ in self.lengths)} rows"
        else:
            what = f"B{len(self.lengths)} L{keys}" if queries == keys else f"B{len(self.lengths)} {queries}x{keys}"
        mask = f"window {self.window}" if self.window >= 0 else "causal" if self.causal and queries > 1 else ""
        passes = "fwd+bwd" if self.training else ""
        pages = f"pages of {self.page_size}" if self.page_size else ""
        codes = {"": "", "uint8": "e4m3 cache"}.get(self.codes, f"{self.codes} cache")
        size = f"H{self.heads}/{self.heads_k} D{self.head_dim}"
        return " ".join(filter(None, (what, size, _SHORT[self.dtype], mask, pages, codes, passes)))

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one head that the mask leaves."""
        return sum(_pairs(q, k, self.causal, self.window) for q, k in self.lengths)

    @property
    def flops(self) -> int:
        """Multiplications and additions of q k^T and p v, of visible pairs only; in training also of the five products
        of the backward pass, whoever computes some of them twice.
        """
        products = 7 if self.training else 2
        return products * 2 * self.head_dim * self.heads * self.pairs

    @property
    def bytes(self) -> int:
        """q, k and v read once, the output written once; in training these and its gradient read again for theirs."""
        queries, keys = (sum(lengths) for lengths in zip(*self.lengths, strict=True))
        of_q, of_k = 2 * queries * self.heads * self.head_dim, 2 * keys * self.heads_k * self.head_dim
        times = 3 if self.training else 1
        itemsize = getattr(torch, self.dtype).itemsize
        return times * (of_q * itemsize + of_k * (1 if self.codes else itemsize))


def _pairs(queries: int, keys: int, causal: bool, window: int) -> int:
    position = torch.arange(queries) + keys - queries
    last = position.clamp(max=keys - 1) if causal else torch.full_like(position, keys - 1)
    first = (position - window).clamp(min=0) if window >= 0 else torch.zeros_like(position)
    return int((last - first + 1).clamp(min=0).sum())


@dataclass
class Inputs:
    """`(batch, seqlen, heads, head_dim)`, or packed `(total, heads, head_dim)` with `cu_seqlens`.

    k and v are pages `(num_blocks, page_size, heads_k, head_dim)` with `block_table`, codes with `descale`
    `(batch, heads_k)`. `dout`: the gradient of the output, in training.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    block_table: torch.Tensor | None = None
    descale: torch.Tensor | None = None
    seqused: torch.Tensor | None = None  # how many keys of each sequence count, where it is a cache


def inputs(workload: Workload, device: torch.device | str) -> Inputs:
    dtype = getattr(torch, workload.dtype)
    generator = torch.Generator().manual_seed(0)

    def randn(which: int, heads: int) -> torch.Tensor:
        lengths = [pair[which] for pair in workload.lengths]
        rows = (sum(lengths),) if workload.packed else (len(lengths), lengths[0])
        return torch.randn(*rows, heads, workload.head_dim, generator=generator).to(device, dtype)

    q, k, v = randn(0, workload.heads), randn(1, workload.heads_k), randn(1, workload.heads_k)
    dout = randn(0, workload.heads) if workload.training else None
    if not workload.packed:
        x = Inputs(q, k, v, dout)
        if workload.kind == "decode":
            x.seqused = torch.tensor([keys for _, keys in workload.lengths], dtype=torch.int32).to(device)
        if workload.codes:
            _quantise(x, getattr(torch, workload.codes))
        if workload.page_size:
            _to_pages(x, workload.page_size, generator)
        return x
    lengths = torch.tensor([queries for queries, _ in workload.lengths])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    return Inputs(q, k, v, dout, cu_seqlens, int(lengths.max()))


def _quantise(x: Inputs, dtype: torch.dtype) -> None:
    form = quantised.FORMATS[dtype]
    unit = 4.0 / form.largest  # of numbers that are hardly ever larger than 4
    x.k, x.v = (quantised.encoded(t.float() / unit, dtype).view(dtype) for t in (x.k, x.v))
    x.descale = torch.full((x.k.shape[0], x.k.shape[2]), unit, dtype=torch.float32, device=x.k.device)


def _to_pages(x: Inputs, page_size: int, generator: torch.Generator) -> None:
    """In a random order."""
    batch, keys = x.k.shape[:2]
    count = batch * keys // page_size
    order = torch.randperm(count, generator=generator).to(x.k.device)
    x.k, x.v = (t.reshape(count, page_size, *t.shape[2:])[order] for t in (x.k, x.v))
    x.block_table = order.argsort().int().view(batch, -1)


def _same(batch: int, length: int, keys: int | None = None) -> tuple[tuple[int, int], ...]:
    return ((length, length if keys is None else keys),) * batch


def _mixed(count: int, longest: int) -> tuple[tuple[int, int], ...]:
    """Lengths as prompts have them: many short, few long, the same on every machine."""
    lengths = [max(1, round(longest * ((i * 0.618034) % 1.0) ** 2)) for i in range(1, count)]
    return tuple((n, n) for n in [longest, *lengths])


def workloads(device_type: str, full: bool) -> list[Workload]:
    """For a GPU, or smaller ones for a CPU; `full` has several times as many."""
    return _for_cpu(full) if device_type == "cpu" else _for_gpu(full)


def _for_cpu(full: bool) -> list[Workload]:
    found = [Workload("prefill", "float32", 64, 8, 8, _same(1, n)) for n in (256, 1024)]
    found += [
        Workload("prefill", "bfloat16", 64, 8, 2, _same(1, 1024)),
        Workload("decode", "float32", 64, 8, 2, _same(4, 1, 2048)),
        Workload("decode", "bfloat16", 64, 8, 2, _same(4, 1, 2048), page_size=16, codes="int8"),
        Workload("varlen", "float32", 64, 8, 8, _mixed(8, 512)),
        Workload("window", "float32", 64, 8, 8, _same(1, 2048), window=256),
        *(Workload("training", "float32", 64, 8, 8, _same(1, 512), causal) for causal in (True, False)),
    ]
    if full:
        found += [
            Workload("prefill", "float32", 128, 8, 8, _same(2, n), c) for n in (1024, 4096) for c in (True, False)
        ]
        found += [Workload("decode", "bfloat16", 128, 8, 2, _same(1, 1, n)) for n in (2048, 16384)]
        found += [Workload("varlen", "bfloat16", 128, 8, 2, _mixed(32, 1024))]
        found += [Workload("window", "bfloat16", 128, 8, 2, _same(1, 8192), window=1024)]
        found += [Workload("training", "bfloat16", 128, 8, 2, n) for n in (_same(1, 2048), _mixed(8, 1024))]
    return found


def _for_gpu(full: bool) -> list[Workload]:
    found = [Workload("prefill", "float16", d, 16, 8, _same(1, n)) for d in (64, 128) for n in (512, 2048, 8192)]
    found += [Workload("prefill", "float16", 128, 16, 8, _same(1, 2048), causal=False)]
    found += [
        Workload("decode", "float16", 128, 32, 8, _same(batch, queries, keys), **cache)
        for batch, queries, keys, cache in (
            (1, 1, 1024, {}),
            (1, 1, 8192, {}),
            (1, 1, 131072, {}),
            (1, 4, 8192, {}),
            (1, 16, 8192, {}),
            (16, 1, 8192, {}),
            (16, 1, 8192, {"page_size": 16}),
            (16, 1, 8192, {"codes": "int8"}),
            (16, 1, 8192, {"page_size": 16, "codes": "uint8"}),
        )
    ]
    found += [Workload("varlen", "float16", 128, 16, 8, _mixed(16, 2048))]
    found += [Workload("window", "float16", 128, 16, 8, _same(1, 8192), window=1024)]
    found += [
        Workload("training", "float16", d, 16, 8, _same(1, 2048), causal) for d in (64, 128) for causal in (True, False)
    ]
    if full:
        found += [
            Workload("prefill", dtype, d, 16, 8, _same(4, n), causal)
            for dtype in ("bfloat16", "float32")
            for d in (64, 80, 128, 256)
            for n in (512, 2048)
            for causal in (True, False)
        ]
        found += [Workload("prefill", "float16", d, 16, 16, _same(1, 4096)) for d in (40, 96, 160, 192, 256)]
        found += [
            Workload("decode", "bfloat16", 128, 32, 8, _same(batch, queries, keys), **cache)
            for batch in (1, 16)
            for queries in (1, 4, 16)
            for keys in (1024, 8192, 32768, 131072)
            for cache in ({}, {"page_size": 16}, {"codes": "int8"}, {"codes": "uint8"})
            if batch * keys <= 16 * 32768
        ]
        found += [Workload("decode", "bfloat16", d, 32, 8, _same(4, 1, 8192)) for d in (64, 256, 512)]
        found += [Workload("decode", "bfloat16", 128, 32, n, _same(4, 1, 8192)) for n in (4, 32)]
        found += [Workload("varlen", "bfloat16", d, 16, 8, _mixed(64, 4096)) for d in (64, 128)]
        found += [
            Workload("window", "bfloat16", d, 16, 8, _same(1, n), window=1024) for d in (64, 128) for n in (4096, 16384)
        ]
        found += [
            Workload("training", dtype, d, 16, 8, lengths, causal)
            for dtype in ("bfloat16", "float32")
            for d in (64, 96, 128, 256)
            for lengths in (_same(4, 512), _same(1, 4096))
            for causal in (True, False)
        ]
        found += [Workload("training", "bfloat16", d, 16, 8, _mixed(16, 2048)) for d in (64, 128)]
        found += [Workload("training", "bfloat16", d, 16, 8, _same(1, 8192), window=1024) for d in (64, 128)]
    return found
