"""What a kernel is compiled for, and its source: the sources in `kernels/` behind a preamble of `#define`s."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

_KERNELS = Path(__file__).parent / "kernels"

# The sources of each entry, in the order in which they build on each other.
_SOURCES = {
    "attention_forward": ("params", "fragment", "scoring", "range", "masking", "keys", "staging", "forward"),
    "attention_scalar": ("params", "scoring", "keys", "scalar"),
}

# Buffers that not every call has, in the order of the arguments, and the type of their elements.
OPTIONAL_BUFFERS = {
    "cu_seqlens_q": "int",
    "cu_seqlens_k": "int",
    "seqused_q": "int",
    "seqused_k": "int",
    "kv_batch_idx": "int",
    "leftpad_k": "int",
    "block_table": "int",
    "alibi_slopes": "float",
    "sinks": "float",
    "mask": "MASK_T",
    "softmax_scale": "SCALE_T",
}
_FIRST_OPTIONAL = 6  # q, k, v, out, lse and params come first


class Variant(NamedTuple):
    """The shape of the tiled kernel: what is fastest depends on the GPU."""

    rows: int  # queries of a simdgroup: a multiple of 8
    simdgroups: int  # simdgroups of a threadgroup
    keys: int  # keys of a block: a multiple of 8
    staged: bool  # do the simdgroups of a group share their keys through threadgroup memory?

    def __str__(self) -> str:
        """Like "16x4x32-direct", as `MTLFLASHATTN_VARIANT` takes it."""
        return f"{self.rows}x{self.simdgroups}x{self.keys}-{'staged' if self.staged else 'direct'}"


class Mask(NamedTuple):
    """How the elements of a mask lie in memory."""

    type: str  # Metal's name: uchar, where 0 hides; others are added
    aligned: int  # bytes to which rows are aligned: 16, 4 or 1; 0 where the columns are not neighbours
    rows_are_one: bool  # have all queries the same row?
    columns_are_one: bool


class Specialization(NamedTuple):
    """Everything that the compiled code depends on."""

    entry: str
    dtype: str  # Metal's name: half, bfloat, float
    head_dim: int
    head_dim_v: int
    vector: int  # elements to which the rows of q and k are aligned, 16 bytes at most
    vector_v: int  # likewise v and out
    left: bool  # is that side of the window closed?
    right: bool
    softcap: bool
    want_lse: bool
    buffers: tuple[str, ...]  # the optional buffers that are given
    mask: Mask | None
    scale_type: str
    variant: Variant

    def source(self) -> str:
        """The Metal source, ASCII."""
        given = set(self.buffers)
        element_bytes = 4 if self.dtype == "float" else 2
        rows, simdgroups, keys, staged = self.variant
        mask = self.mask or Mask("uchar", 0, False, False)
        defines = {
            "T": self.dtype,
            "ELEMENT_BYTES": element_bytes,
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "VECTOR": self.vector,
            "VECTOR_V": self.vector_v,
            "ROWS": rows,
            "SIMDGROUPS": simdgroups,
            "KEYS": keys,
            "STAGED": int(staged),
            "HAS_LEFT": int(self.left),
            "HAS_RIGHT": int(self.right),
            "HAS_SOFTCAP": int(self.softcap),
            "HAS_ALIBI": int("alibi_slopes" in given),
            "HAS_SINKS": int("sinks" in given),
            "HAS_KV_BATCH_IDX": int("kv_batch_idx" in given),
            "HAS_LEFTPAD_K": int("leftpad_k" in given),
            "MASK_KIND": 0 if self.mask is None else 1 if mask.type == "uchar" else 2,
            "MASK_T": mask.type,
            "MASK_T_BYTES": {"uchar": 1, "float": 4}.get(mask.type, 2),
            "MASK_ALIGNED": mask.aligned,
            "MASK_ROWS_ARE_ONE": int(mask.rows_are_one),
            "MASK_COLUMNS_ARE_ONE": int(mask.columns_are_one),
            "SCALE_IS_TENSOR": int("softmax_scale" in given),
            "SCALE_T": self.scale_type,
            "PACKED_Q": int("cu_seqlens_q" in given),
            "PACKED_K": int("cu_seqlens_k" in given),
            "USED_Q": int("seqused_q" in given),
            "USED_K": int("seqused_k" in given),
            "PAGED": int("block_table" in given),
            "WANT_LSE": int(self.want_lse),
        }
        buffers = [(name, OPTIONAL_BUFFERS[name]) for name in self.buffers]
        declared = " ".join(
            f"device const {kind}* {name} [[buffer({_FIRST_OPTIONAL + n})]]," for n, (name, kind) in enumerate(buffers)
        )
        taken = " ".join(f"in.{name} = {name};" for name, _ in buffers)
        return "\n".join(
            [
                "#include <metal_stdlib>",
                "#include <metal_simdgroup_matrix>",
                "using namespace metal;",
                *(f"#define {name} {value}" for name, value in defines.items()),
                f"#define OPTIONAL_BUFFERS {declared}",
                f"#define TAKE_OPTIONAL_BUFFERS {taken}",
                *(_text(name) for name in _SOURCES[self.entry]),
            ]
        )


@functools.cache
def _text(name: str) -> str:
    return (_KERNELS / f"{name}.metal").read_text(encoding="ascii")


def sources() -> list[tuple[str, str]]:
    """Name and text of every source that some kernel is made of."""
    return [(name, _text(name)) for name in dict.fromkeys(name for names in _SOURCES.values() for name in names)]


@functools.cache
def parameters() -> tuple[str, ...]:
    """The names of `params.metal`, in the order in which a launch lists their values."""
    body = re.search(r"enum Param \{(.*?)\}", _text("params"), re.DOTALL).group(1)
    return tuple(re.findall(r"[A-Z_]+", re.sub(r"//.*", "", body)))
