"""Miscompiled kernels, compilers that refuse or crash, pipelines that take fewer threads: nobody gets a wrong result.

For all kernels but the tiled one, whose faults `test_proof.py` plants.
"""

import functools
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch

from flash_attn_mps import checks, flash_attention, tiers
from flash_attn_mps.frontends import fa2
from flash_attn_mps.tiers.metal import backward_kernels, compiler, launch, proved, store, tensorops, variants
from metal_host import compile_shader, observe

from .calls import Spec, draw
from .test_proof import CALLS, CAUSAL, DEFAULT, DIMS, Fault, compiled_by, recorded
from .test_proof import FAULTS as TILED

HALF = "half"
METAL4 = functools.partial(compile_shader, version="4.0")


@pytest.fixture(autouse=True)
def _first_use(monkeypatch, tmp_path):
    """A machine on which no kernel was used before, whose only tier besides is `torch`; lengths are on the device."""
    monkeypatch.setenv(proved.PROVE, "once")
    monkeypatch.setenv(store.CACHE, str(tmp_path))
    monkeypatch.setattr(checks, "readable", lambda _tensor: False)
    monkeypatch.setattr(tiers, "ORDER", tuple(tier for tier in tiers.ORDER if tier.name != "cpu"))
    variants.forget()
    compiler.clear()
    yield
    compiler.clear()
    variants.forget()


@functools.cache
def specializations(grid):
    """Of a grid of calls, those of small heads first."""
    return sorted(recorded(CALLS[grid]()), key=lambda s: (s.dtype != HALF, s.head_dim + s.head_dim_v))


def causal(s):
    return s.right and s.mask is None


def masked(s):
    return s.mask is not None and s.mask.type == "uchar"


def plain(s):
    return not s.softcap and s.mask is None


def whole(s):
    return "partial_o" not in s.buffers


def rotates(s):
    return s.rotary_dim > 0 and "block_table" in s.buffers


# Of each kernel and kind of fault: what is planted, and in which specialization it matters.
LANES = ("lane.column = short((index", "lane.column = 6 - short((index")
TAIL = "bool seen = key < seqlen_k;"
NARROW = ("key <= row + scoring.offset", "key < row + scoring.offset")
UNREAD = ("return x ? s : -INFINITY;", "return s;")
SCORE = "float s = x[r].thread_elements()[i], slope"
STORED = "if (row < rows) S::store("
FAULTS = {
    ("decode", "attention_decode"): {
        "swapped lanes": (*LANES, whole),
        "a tail that is missing": (TAIL, "bool seen = key < seqlen_k / 8 * 8;", whole),
        "scores summed in half": (
            "float x = s[r][n].thread_elements()[e];",
            "float x = float(half(s[r][n].thread_elements()[e]));",
            whole,
        ),
        "NaN tests folded away": ("nan_if_nonfinite != 0.0f", "false", masked),
        "tests for infinities folded away": ("m == -INFINITY ? 0.0f : m;", "m;", whole),
        "rows 4 to 7 wrong": (
            "float l = row_sum(state.l[r]);",
            "float l = row_sum(state.l[r]); if (lane.row >= 4) l *= 2.0f;",
            whole,
        ),
        "zeros": ("float l = row_sum(state.l[r]);", "float l = 0.0f;", whole),
        "nothing written": ("if (row < rows) {", "if (row < 0) {", lambda s: not whole(s)),
        "an idle unit": ("merge_units(shared, state, scoring, unit, index);", "", lambda s: s.variant.units > 1),
        "no rescaling": ("if (simd_any(m > state.m[r])) {", "if (state.m[r] == -INFINITY) {", whole),
        "a window that is too narrow": (*NARROW, causal),
        "a mask that is not read": (*UNREAD, masked),
        "another head of a tile": (
            "int head = first_head + row % HEADS_IN_TILE;",
            "int head = first_head;",
            lambda s: whole(s) and s.variant.heads_in_tile > 1,
        ),
        "another split": ("part_of(range, splits, split)", "part_of(range, splits, 0)", lambda s: not whole(s)),
    },
    ("decode", "attention_combine"): {
        "an idle simdgroup": ("int part = simdgroup; part", "int part = simdgroup / 2 * 2; part", None),
        "half a sum": ("o[c] += rescale *", "o[c] = rescale *", None),
        "tests for infinities folded away": ("m == -INFINITY ? 0.0f : m;", "m;", None),
        "zeros": ("is_query && statistics.l > 0.0f ?", "false ?", None),
        "a log-sum-exp of another base": ("log2(row.l) / LOG2E", "log2(row.l)", lambda s: "lse" in s.buffers),
    },
    ("backward", "attention_backward_rows"): {
        "lanes that do not add up": (
            "row_sum(SlabV::dot(do_row, out_row, lane))",
            "SlabV::dot(do_row, out_row, lane)",
            None,
        ),
        "a gradient of the log-sum-exp that is not read": (
            "delta -= dlse[row_of_head + inside];",
            "",
            lambda s: "dlse" in s.buffers,
        ),
        "lanes of a walk that do not add up": (
            "walk.l = row_sum(walk.l);",
            "",
            lambda s: s.mask is not None and not s.softcap,
        ),
        "tests for infinities folded away": (" && lse_of_row != -INFINITY;", ";", causal),
        "nothing written": ("if (lane.column == 0 && row < sequence.rows_q)", "if (false)", None),
        "rows 4 to 7 wrong": ("if (lane.column == 0 && row", "if (lane.column == 0 && lane.row < 4 && row", None),
    },
    ("backward", "attention_backward_queries"): {
        "swapped lanes": (*LANES, None),
        "a tail that is missing": ("passes >= passing.count ||", "passes >= passing.count / 8 * 8 ||", None),
        "a tail that is too long": (
            "passes >= passing.count || !is_visible(scoring, row, key, OF_KEYS ? held.count : passing.count)",
            "!is_visible(scoring, row, key, OF_KEYS ? held.count : passing.count + 8)",
            None,
        ),
        "scores summed in half": (SCORE, "float s = float(half(x[r].thread_elements()[i])), slope", plain),
        "rows 4 to 7 wrong": (STORED, "if (row < rows && lane.row < 4) S::store(", None),
        "zeros": ("float factor = scoring.sign * scoring.scale;", "float factor = 0.0f;", None),
        "nothing written": (STORED, "if (row < 0) S::store(", None),
        "an idle simdgroup": (
            "if (held.first >= sequence.seqlen_q) range",
            "if (simdgroup + 1 == SIMDGROUPS) range",
            lambda s: s.variant.simdgroups > 1,
        ),
        "a window that is too narrow": (*NARROW, causal),
        "heads of k for those of q": ("head / int(params[HEADS_PER_KV_HEAD])", "head % 2", None),
        "a mask that is not read": (*UNREAD, masked),
        "delta left out": ("(dp - terms.z) * slope", "dp * slope", None),
        "fragments not transposed": ("ds[r] = transposed(ds[r], lane.index)", "ds[r] = ds[r]", None),
    },
    ("backward", "attention_backward_keys"): {
        "swapped lanes": (*LANES, None),
        "a tail that is missing": ("passes >= passing.count ||", "passes >= passing.count / 8 * 8 ||", None),
        "scores summed in half": (SCORE, "float s = float(half(x[r].thread_elements()[i])), slope", plain),
        "NaN tests folded away": (
            "bool sees_nothing = terms_of_row.y == INFINITY;",
            "bool sees_nothing = false;",
            lambda s: s.mask is not None and not s.mask.rows_are_one and {"dv", "sinks"} & set(s.buffers) == {"dv"},
        ),
        "rows 4 to 7 wrong": (STORED, "if (row < rows && lane.row < 4) S::store(", None),
        "nothing written": (STORED, "if (row < 0) S::store(", None),
        "a head left out": (
            "head < first_head + heads; ++head",
            "head < first_head + 1; ++head",
            lambda s: s.kernel is backward_kernels.KEYS,
        ),
        "a window that is too narrow": (*NARROW, causal),
        "a mask that is not read": (*UNREAD, masked),
        "delta left out": ("(dp - terms.z) * slope", "dp * slope", lambda s: "dk" in s.buffers),
        "hidden keys that give": ("if (hidden) kept = change = 0.0f;", "if (hidden) change = 0.0f;", causal),
    },
    ("backward", "attention_backward_mask"): {
        "lanes that do not add up": ("if (rows == 1) sum = column_sum(sum);", "", lambda s: s.mask.rows_are_one),
        "nothing written": ("if (row < rows && column < columns)", "if (false)", None),
        "rows 4 to 7 wrong": (
            "if (row < rows && column",
            "if (lane.row < 4 && row < rows && column",
            lambda s: not s.mask.rows_are_one,
        ),
        "delta left out": ("(dp - terms.z) * slope", "dp * slope", None),
    },
    ("append", "rotate_and_append"): {
        "swapped signs": ("-(x1 * sine)", "x1 * sine", rotates),
        "queries at one position": ("place.row * params[ADVANCE]", "0", lambda s: rotates(s) and "q" in s.buffers),
        "new keys at one position": ("start_of(from.place.sequence, in) + from.place.row", "0", rotates),
        "rows over each other": ("at.row = row % params[PAGE_SIZE];", "at.row = 0;", rotates),
        "a row without a place": (
            "bool is_there = row >= 0 && row < params[ROOM];",
            "bool is_there = true;",
            lambda s: "cached" in s.buffers,
        ),
        "keys for values": (
            "head - heads_k, v, v_cache",
            "head - heads_k, v, k_cache",
            lambda s: s.head_dim == s.head_dim_v,
        ),
        "codes of another scale": (
            "of_x[i] = encoded(precise::divide(float(T(x[i])), descale));",
            "of_x[i] = encoded(float(T(x[i])));",
            lambda s: "k_descale" in s.buffers,
        ),
        "lengths without the new keys": (
            "seqlen += params[SEQLEN_NEW];",
            "",
            lambda s: "seqused_k" in s.buffers and "cu_seqlens_k_new" not in s.buffers,
        ),
    },
}

KINDS = [(*of, kind) for of, kinds in FAULTS.items() for kind in kinds]
#: By default two kinds for each kernel: the others are of the same trials.
BY_DEFAULT = {
    "scores summed in half",
    "no rescaling",
    "tests for infinities folded away",
    "NaN tests folded away",
    "lanes that do not add up",
    "a row without a place",
    "another split",
}


@pytest.mark.parametrize(
    ("grid", "entry", "kind"),
    [pytest.param(*of, marks=[pytest.mark.metal_full] * (of[2] not in BY_DEFAULT)) for of in KINDS],
)
def test_miscompiled_kernels_do_not_pass(grid, entry, kind, monkeypatch):
    old, new, matters = FAULTS[grid, entry][kind]
    s = next(
        s
        for s in specializations(grid)
        if s.kernel.entry == entry and (not matters or matters(s)) and old in s.source()
    )
    assert compiler.kernel(s) is not None, compiler.failures
    compiled_by(monkeypatch, Fault(old, new))
    with pytest.warns(RuntimeWarning, match=f"{entry} gave a wrong result for a test problem"):
        assert compiler.kernel(s) is None


# The kernel on tensor operations reads what the tiled one reads of these.
LARGE = Spec([(70, 70)], DIMS, std=(0.01, 1.0, 1e4))
OF_TENSOROPS = {
    kind: (fault.old, fault.new, fault.spec) for kind, fault in TILED.items() if fault.variant is DEFAULT
} | {
    "outputs summed in half": ("c[i] = destination[i];", "c[i] = float(half(destination[i]));", LARGE),
    "another layout of results": ("return 8 * (t / 4) + 4 * r + t % 4;", "return 8 * r + t;", CAUSAL),
    "another layout of keys": ("return 4 * i + j;", "return 4 * j + i;", CAUSAL),
    "products that are not added": ("mode::multiply_accumulate", "mode::multiply", CAUSAL),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.metal_full] * (kind not in ("swapped lanes", "outputs summed in half")))
        for kind in OF_TENSOROPS
    ],
)
def test_miscompiled_tensor_operations_do_not_pass(kind, monkeypatch):
    old, new, spec = OF_TENSOROPS[kind]
    variant = tensorops.FORWARD.default(2, *DIMS)._replace(layout=tensorops.LAYOUTS["apple10"])
    (s,) = recorded([functools.partial(launch.run, draw(spec).problem, tensorops.FORWARD, variant)])
    assert old in s.source()
    compiled_by(monkeypatch, METAL4)
    assert compiler.kernel(s) is not None, compiler.failures
    compiled_by(monkeypatch, lambda source: METAL4(source.replace(old, new)))
    with pytest.warns(RuntimeWarning, match="attention_tensorops gave a wrong result for a test problem"):
        assert compiler.kernel(s) is None


@pytest.mark.parametrize("entry", ["attention_decode", "attention_combine"])
def test_codes_with_scales_of_their_own_pass_in_splits(entry):
    """The maxima that splits exchange are in units of each sequence's codes, where nothing else scales scores."""

    def is_it(s):
        return s.kernel.entry == entry and {"k_descale", "block_table", "sinks"} <= set(s.buffers) and masked(s)

    of_codes = [s for s in specializations("decode") if is_it(s) and not s.softcap and "alibi_slopes" not in s.buffers]
    s = next(s for s in of_codes if entry == "attention_combine" or not whole(s))
    assert compiler.kernel(s) is not None, compiler.failures


# Calls that need all kernels together: few queries against many keys, a step of generation, and training.
def tensors(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


def few_queries():
    q, k, v = tensors((1, 2, 4, 16), (1, 3000, 2, 16), (1, 3000, 2, 16))
    return [fa2.flash_attn_func(q, k, v, causal=True)]


def generation():
    q, k, v, k_cache, v_cache = tensors((2, 1, 4, 16), *[(2, 1, 2, 16)] * 2, *[(2, 3000, 2, 16)] * 2)
    lengths, angles = torch.tensor([7, 2900], dtype=torch.int32), torch.arange(3000.0)[:, None] / torch.arange(1.0, 9.0)
    out = fa2.flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v), angles.cos(), angles.sin(), cache_seqlens=lengths, causal=True
    )
    return [out, k_cache, v_cache]


def training():
    q, k, v, mask = tensors((2, 40, 4, 16), *[(2, 40, 2, 16)] * 2, (1, 1, 40, 40))
    leaves = [x.requires_grad_() for x in (q, k, v, mask)]
    out = flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


CALLERS = {
    few_queries: ["attention_decode", "attention_combine"],
    generation: ["rotate_and_append", "attention_decode", "attention_combine"],
    training: [
        f"attention_{name}" for name in ("forward", *(f"backward_{x}" for x in ("rows", "queries", "keys", "mask")))
    ],
}
STEPS = [(call, entry) for call, entries in CALLERS.items() for entry in entries]


@pytest.fixture(scope="module")
def expected():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tiers.FORCE, "torch")
        patch.setattr(checks, "readable", lambda _tensor: False)
        return {call: call() for call in CALLERS}


def computed(call, expected):
    """The kernels that computed it, and the warnings. Right."""
    with warnings.catch_warnings(record=True) as caught, observe(instrumented=False) as launches:
        warnings.simplefilter("always")
        results = call()
    for found, exact in zip(results, expected[call], strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    return [one.kernel for one in launches], [str(one.message) for one in caught]


@pytest.mark.parametrize("call", CALLERS)
def test_these_calls_need_them_all(call, expected):
    assert computed(call, expected) == (CALLERS[call], [])


class Crash:
    """A compiler that crashes on a kernel."""

    says = "did not compile.*Apple's compiler crashes on some large kernels"

    def __init__(self, entry):
        self.entry = entry

    def __call__(self, source):
        if f"kernel void {self.entry}(" in source:
            raise RuntimeError("Failed to create pipeline state object: XPC_ERROR_CONNECTION_INTERRUPTED")
        return compile_shader(source)


class Refusal(Crash):
    """One that does not accept it."""

    says = "did not compile .*: program_source:9:1: error.*Please report"

    def __call__(self, source):
        if f"kernel void {self.entry}(" in source:
            raise SyntaxError("program_source:9:1: error: no matching function")
        return compile_shader(source)


class FailedLaunch(Crash):
    """A kernel that cannot be launched."""

    says = "failed on a test problem .*: RuntimeError: no such command buffer.*Please report"

    def __call__(self, source):
        library = compile_shader(source)
        return SimpleNamespace(**{self.entry: self.launch}) if f"kernel void {self.entry}(" in source else library

    def launch(self, *_values, **_how):
        raise RuntimeError("no such command buffer")


@pytest.mark.parametrize(
    "fault", [Crash, *(pytest.param(fault, marks=pytest.mark.metal_full) for fault in (Refusal, FailedLaunch))]
)
@pytest.mark.parametrize(("call", "entry"), STEPS)
def test_a_kernel_that_is_refused_or_fails_is_replaced(call, entry, fault, expected, monkeypatch):
    compiled_by(monkeypatch, fault(entry))
    kernels, (warning,) = computed(call, expected)
    assert entry not in kernels
    assert f"the Metal kernel {entry} " in warning
    assert re.search(fault.says, warning)
    assert computed(call, expected)[1] == [], "one warning"


class Capped:
    """A compiler whose pipelines take so many threads and no more, with a ValueError as torch raises it."""

    def __init__(self, most):
        self.most, self.largest = most, 0

    def __call__(self, source):
        entry = re.search(r"kernel void (\w+)\(", source)[1]
        return SimpleNamespace(**{entry: self.limited(getattr(compile_shader(source), entry))})

    def limited(self, function):
        def call(*values, threads, group_size):
            count = math.prod(group_size)
            if count > self.most:
                raise ValueError(f"Threadgroup size exceeds {self.most} limit")
            self.largest = max(self.largest, count)
            function(*values, threads=threads, group_size=group_size)

        call.max_threads_per_threadgroup = self.most
        return call


@pytest.mark.parametrize(
    ("most", "prove"),
    [
        (64, "off"),
        *(
            pytest.param(most, prove, marks=pytest.mark.metal_full)
            for prove in ("once", "off")
            for most in (832, 512, 64, 32)
            if (most, prove) != (64, "off")
        ),
    ],
)
@pytest.mark.parametrize("call", CALLERS)
def test_pipelines_of_fewer_threads(call, most, prove, expected, monkeypatch):
    """Enough for all, or smaller groups, or another kernel."""
    monkeypatch.setenv(proved.PROVE, prove)
    capped = Capped(most)
    compiled_by(monkeypatch, capped)
    kernels, told = computed(call, expected)
    assert capped.largest <= most
    if most >= 512:
        assert (kernels, told) == (CALLERS[call], [])
    for warning in told:
        assert re.search(rf"does not fit on this machine .* and this GPU gives it {most} at most", warning)
        assert "report" not in warning
    assert computed(call, expected)[1] == [], "one warning for each kernel"
