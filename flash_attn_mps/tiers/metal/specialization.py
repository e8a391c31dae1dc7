"""What a kernel is compiled for, and its source: what both sides must agree on, then the sources in `kernels/`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .kernel import OPTIONAL_BUFFERS, Kernel, Parameters, Program

_KERNELS = Path(__file__).parent / "kernels"
# The bound of a group's threads in a kernel's attribute is 64 at least: with 32 Apple's compiler got rows 4 to 7 of 8x8
# tiles wrong (tracel-ai/cubek#645), and barriers broke (MoltenVK#2711).
_BOUND = "#define BOUND(threads) ((threads) < 64 ? 64 : (threads))"
# Ahead of Metal's own headers: under PYTORCH_MPS_FAST_MATH torch asks for a mode in which tests for NaN and infinities
# may be left out. Metal 3.1 has no such pragma: there the proof finds out (prove.py).
_MATH = ("#if __METAL_VERSION__ >= 320", "#pragma METAL fp math_mode(safe)", "#endif")


class Compilable(Protocol):
    """What is compiled; equal where the source is the same."""

    @property
    def kernel(self) -> Program: ...

    @property
    def threads(self) -> int:
        """Of a group, at most."""
        ...

    def source(self) -> str: ...

    def _asdict(self) -> dict[str, Any]: ...

    def __hash__(self) -> int: ...


class Mask(NamedTuple):
    """How the elements of a mask lie in memory."""

    type: str  # Metal's name: uchar, where 0 hides; others are added
    aligned: int  # bytes to which rows are aligned: 16, 4 or 1; 0 where the columns are not neighbours
    rows_are_one: bool  # have all queries the same row?
    columns_are_one: bool


class Specialization(NamedTuple):
    """Everything that the compiled code depends on."""

    kernel: Kernel
    dtype: str  # Metal's name: half, bfloat, float
    kv_format: str  # of k and v where they are quantised, as quantised.Format names it; else empty
    head_dim: int
    head_dim_v: int
    vector: int  # elements to which rows of head_dim elements are aligned, 16 bytes at most
    vector_v: int  # likewise those of head_dim_v
    left: bool  # is that side of the window closed?
    right: bool
    softcap: bool
    dropout: bool
    buffers: tuple[str, ...]  # the optional ones that are given
    mask: Mask | None
    scale_type: str
    variant: Any  # of the kernel's own type

    @property
    def threads(self) -> int:
        """Of a group."""
        return self.kernel.threads(self.variant)

    def source(self) -> str:
        """The Metal source, ASCII."""
        return source_of(self.kernel, self._defines(), self._declarations())

    def _defines(self) -> dict[str, object]:
        mask = self.mask or Mask("uchar", 0, False, False)
        optional = [*OPTIONAL_BUFFERS, *(name for name, buffer in self.kernel.buffers.items() if buffer.optional)]
        return {
            "T": self.dtype,
            "ELEMENT_BYTES": 4 if self.dtype == "float" else 2,
            "T_IS_HALF": int(self.dtype == "half"),
            "T_IS_BFLOAT": int(self.dtype == "bfloat"),
            **of_kv_format(self.kv_format),
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "VECTOR": self.vector,
            "VECTOR_V": self.vector_v,
            "HAS_WINDOW_LEFT": int(self.left),
            "HAS_WINDOW_RIGHT": int(self.right),
            "HAS_SOFTCAP": int(self.softcap),
            "HAS_DROPOUT": int(self.dropout),
            **{f"HAS_{name.upper()}": int(name in self.buffers) for name in optional},
            "MASK_IS_BOOL": int(self.mask is not None and mask.type == "uchar"),
            "MASK_IS_ADDED": int(self.mask is not None and mask.type != "uchar"),
            "MASK_T": mask.type,
            "MASK_T_BYTES": {"uchar": 1, "float": 4}.get(mask.type, 2),
            "MASK_ALIGNED": mask.aligned,
            "MASK_ROWS_ARE_ONE": int(mask.rows_are_one),
            "MASK_COLUMNS_ARE_ONE": int(mask.columns_are_one),
            "SCALE_T": self.scale_type,
            **{name.upper(): int(value) for name, value in self.variant._asdict().items()},
            **self.kernel.defines,
        }

    def _declarations(self) -> list[str]:
        """BUFFERS, a kernel's arguments up to Metal's own; the names of its parameters; INPUTS, which fills Inputs."""
        kernel, given = self.kernel, [name for name in self.kernel.optional if name in self.buffers]
        types = {
            **{
                name: f"device {buffer.type}*"
                for name, buffer in kernel.buffers.items()
                if name in self.buffers or not buffer.optional
            },
            "params": "constant long*",
            **{name: f"device const {OPTIONAL_BUFFERS[name]}*" for name in given},
        }
        return declarations(types, ["params", *given], parameter_names(kernel))


def of_kv_format(kv_format: str) -> dict[str, object]:
    """What codes.metal is told of the format of keys and values; empty for none."""
    if not kv_format:
        return {"KV_T": "T", "KV_FORMAT": 0}
    return {"KV_T": "uchar", "KV_FORMAT": f"KV_IS_{kv_format.upper()}"}


def source_of(program: Program, defines: Mapping[str, object], declared: Sequence[str]) -> str:
    """The text of a program's sources, behind what the host tells them."""
    return "\n".join(
        [
            *_MATH,
            _BOUND,
            *(f"#include <{header}>" for header in program.headers),
            "using namespace metal;",
            *(f"#define {name} {value}" for name, value in defines.items()),
            *declared,
            *(_text(name) for name in program.sources),
        ]
    )


def declarations(types: Mapping[str, str], inputs: Sequence[str], parameters: Sequence[str]) -> list[str]:
    """BUFFERS: the arguments of these types; Inputs and INPUTS: those of them that functions need; the parameters."""
    arguments = (f"{kind} {name} [[buffer({n})]]," for n, (name, kind) in enumerate(types.items()))
    return [
        f"#define BUFFERS {' '.join(arguments)}",
        f"enum Param {{ {', '.join(parameters)} }};",
        f"struct Inputs {{ {' '.join(f'{types[name]} {name};' for name in inputs)} }};",
        f"#define INPUTS {{ {', '.join(inputs)} }}",
    ]


def parameter_names(kernel: Kernel) -> list[str]:
    """In the order in which `launch.arguments` lists their values."""
    rows = [name for name, buffer in kernel.buffers.items() if buffer.row]
    strides = [f"{name}_{axis}" for name in rows for axis in ("batch", "row", "head")]
    return [name.upper() for name in (*Parameters._fields, *strides, *kernel.parameters)]


@functools.cache
def _text(name: str) -> str:
    return (_KERNELS / f"{name}.metal").read_text(encoding="ascii")


def sources() -> list[tuple[str, str]]:
    """Name and text of every source in `kernels/`."""
    return [(name, _text(name)) for name in sorted(file.stem for file in _KERNELS.glob("*.metal"))]
