"""What the host knows of a kernel: a `Kernel` for each, in the host file that launches it (`simdgroup.py`, say).

Everything that both sides must agree on is written here or there once, in Python: `Specialization.source` declares it
to Metal, `launch.arguments` fills it in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...problem import AttentionProblem

Grid = tuple[tuple[int, int, int], tuple[int, int, int]]  # threads in all, threads of a group

# What every Metal kernel for attention honours; "quantised" is for each to add, whose loads decode (codes.metal).
# "gradients": the forward pass of a call that will be differentiated; another tier computes the gradients.
SERVES = frozenset(
    {
        "causal",
        "window",
        "softcap",
        "alibi",
        "varlen",
        "seqused",
        "paged",
        "kv_batch_idx",
        "leftpad_k",
        "mask",
        "sinks",
        "scale_tensor",
        "gradients",
    }
)

# The tensors of a problem that not every problem has, and Metal's type of their elements. A kernel gets those that it
# lists and the problem has, and knows which by HAS_CU_SEQLENS_Q and so on.
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
    "k_descale": "float",
    "v_descale": "float",
}


class Parameters(NamedTuple):
    """What every kernel is told of its problem, as 64-bit integers; in Metal params[SEQLEN_Q] and so on.

    Strides count elements. Floats travel as their bits.
    """

    seqlen_q: int  # queries and keys of a sequence, where the batch is dense
    seqlen_k: int
    total_q: int  # rows of q, where the batch is packed
    batch: int  # sequences
    heads: int
    heads_per_kv_head: int
    lse_batch: int  # strides of the log-sum-exp; a packed batch has none of its own
    lse_head: int
    window_left: int  # where that side is closed
    window_right: int
    softmax_scale: int  # float bits, unless it is a buffer
    softcap: int  # float bits
    seed: int  # of dropout
    dropout_threshold: int  # see philox.py
    dropout_scale: int  # float bits
    alibi_batch: int  # stride
    page_size: int
    block_table_row: int  # stride
    mask_batch: int  # strides
    mask_head: int
    mask_row: int
    mask_column: int
    k_descale_batch: int  # strides
    k_descale_head: int
    v_descale_batch: int
    v_descale_head: int


class Buffer(NamedTuple):
    """A buffer that a kernel has besides those of `OPTIONAL_BUFFERS`."""

    type: str  # Metal's, of its elements: "const T", "float"; "const KV_T" for keys and values that may be quantised
    # "head_dim" or "head_dim_v": its rows have so many elements, next to each other. The strides of its batch, rows and
    # heads are parameters: Q_BATCH (0 in a packed tensor), Q_ROW, Q_HEAD.
    row: str = ""
    optional: bool = False  # may be None; HAS_LSE, say, tells whether it is there


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Program:
    """A function in Metal. There is one object for each, so that it is cheap as part of a key."""

    entry: str  # Metal's name of the function
    headers: tuple[str, ...]  # of Metal's library
    sources: tuple[str, ...]  # of kernels/, in the order in which they build on each other
    # Of a specialization and its compiled function: why that is not to be used, a `refusals.Refusal`; None if it is.
    # Asked when it is first used on a machine (`prove.Proof`).
    proof: Callable[[Any, Any], Any | None] | None = None

    def __repr__(self) -> str:
        return self.entry


def _threads(variant: Any) -> int:
    return 32 * variant.simdgroups


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Kernel(Program):
    """One kernel that works on an `AttentionProblem`.

    A kernel is launched in some variant: a NamedTuple of numbers of its own, which Metal has in capitals, as ROWS.
    """

    buffers: Mapping[str, Buffer]  # in the order of the arguments
    optional: tuple[str, ...]  # which of OPTIONAL_BUFFERS it reads
    parameters: tuple[str, ...] = ()  # names of those that it has besides `Parameters` and strides
    # What its sources, shared with others, are told of it.
    defines: Mapping[str, int | str] = field(default_factory=dict)
    grid: Callable[[AttentionProblem, Any], Grid]  # of a problem and a variant
    threads: Callable[[Any], int] = _threads  # of a group of that grid, of a variant


# Classes of calls, and the longest that each has; "long" has all others, and this is a typical one.
LENGTHS = {"short": 512, "medium": 2048, "long": 8192}


def _always(_variant: Any) -> bool:
    return True


def _queries(p: AttentionProblem) -> int:
    return p.max_seqlen_q


def _nothing(_p: AttentionProblem) -> int:
    return 0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Choice:
    """Between variants. Head dims decide which of them fit; which is fastest depends on the GPU.

    The `str` of a variant is its name: in the environment, and where `tune` keeps what it found.
    """

    entry: str  # of what there are variants
    variants: tuple[Any, ...]
    fits: Callable[[Any, int, int, int], bool]  # variant, bytes of an element, head_dim, head_dim_v
    default: Callable[..., Any]  # of these three numbers, one that fits: what this GPU should do well with
    variable: str  # of the environment, which forces one
    # Registers that a problem's features take beyond those of a plain one. Where there are any, `default` is told, too.
    demands: Callable[[AttentionProblem], int] = _nothing
    gradients: frozenset[str] = frozenset()  # of which tensors it computes them; of none: it computes the output
    worth_tuning: Callable[[Any], bool] = _always  # is a variant one of those that `tune` times?
    label: str = ""  # what tells it from others with its entry, where `tune` keeps what it found
    # By what `length_of` a call, variants are chosen: a name for each class of them, as `LENGTHS`.
    length_of: Callable[[AttentionProblem], int] = _queries
    lengths: Mapping[str, int] = field(default_factory=lambda: LENGTHS)
    # What is timed of a class, and (small) what shows whether a variant works: of a `store.Key`, a device, and `small`.
    problem: Callable[[Any, Any, bool], AttentionProblem] | None = None
    # Runs it, where `launch.run` does not: problem and variant.
    run: Callable[[AttentionProblem, Any], Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.entry} {self.label}".strip()

    def class_of(self, p: AttentionProblem) -> str:
        """The name of the class of calls that `p` is one of."""
        length = self.length_of(p)
        return "short" if length <= self.lengths["short"] else "medium" if length <= self.lengths["medium"] else "long"

    def fitting(self, element_bytes: int, head_dim: int, head_dim_v: int) -> list[Any]:
        """Those that these head dims allow."""
        return [variant for variant in self.variants if self.fits(variant, element_bytes, head_dim, head_dim_v)]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TunedKernel(Kernel, Choice):
    """A kernel of several variants."""

    # What to try in turn where one is refused on this machine, by the arguments of `fits`.
    fallbacks: Callable[[Any, int, int, int], Sequence[Any]] = lambda *_: ()
