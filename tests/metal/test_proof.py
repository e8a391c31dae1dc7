"""A kernel proves itself before it is believed: no fault that is planted in one reaches a caller's result."""

import pkgutil
import re
import threading
import timeit
import warnings
from functools import partial
from importlib import import_module
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from flash_attn_mps import checks, tiers
from flash_attn_mps.frontends import cache_append
from flash_attn_mps.frontends.cache_plan import describe
from flash_attn_mps.frontends.fa2 import flash_attn_func
from flash_attn_mps.tiers import metal
from flash_attn_mps.tiers.metal import compiler, decode, gpu, launch, proved, scalar, simdgroup, store, trial, variants
from flash_attn_mps.tiers.metal.kernel import Program
from flash_attn_mps.tiers.metal.specialization import Specialization
from metal_host import compile_shader, observe

from . import test_append, test_decode, test_quantised
from .backward import grid as backward_grid
from .calls import Spec, draw
from .grid import cases, cases_of_every_variant, fitting, specs

DIMS = (8, 8)
CAUSAL = Spec([(70, 70), (70, 70)], DIMS, window=(-1, 0))
FULL = Spec([(70, 70)], DIMS)
FEWER_KEYS = Spec([(70, 40)], DIMS, window=(-1, 0))
PACKED = Spec([(33, 40), (70, 70)], DIMS, storage="varlen-used")
MASKED = Spec([(70, 70)], DIMS, mask="bool")
DEFAULT = simdgroup.default(2, *DIMS)
STAGED = DEFAULT._replace(staged=True)
FALLBACKS = [v for v in simdgroup.fallbacks(DEFAULT, 2, *DIMS) if v != DEFAULT and simdgroup.fits(v, 2, *DIMS)]


@pytest.fixture(autouse=True)
def _first_use(monkeypatch, tmp_path):
    """A machine on which no kernel was used before, and whose only tier besides is `torch`."""
    monkeypatch.setenv(proved.PROVE, "once")
    monkeypatch.setenv(store.CACHE, str(tmp_path))
    monkeypatch.setattr(tiers, "ORDER", tuple(tier for tier in tiers.ORDER if tier.name != "cpu"))
    variants.forget()
    compiler.clear()
    yield
    compiler.clear()
    variants.forget()


def compiled_by(monkeypatch, compile_):
    monkeypatch.setattr(compiler, "compile_shader", compile_)
    compiler.clear()


def served(spec: Spec) -> tuple[list[str], list[str]]:
    """Computes a call and checks it against float64. The kernels that computed it (trials are launched by another
    thread, and do not count), none for the tier `torch`; and the warnings."""
    call = draw(spec)
    with warnings.catch_warnings(record=True) as caught, observe(instrumented=False) as launches:
        warnings.simplefilter("always")
        result = tiers.run(call.problem)
    call.check(result)
    return [one.kernel for one in launches], [str(one.message) for one in caught]


def is_of(variant: simdgroup.Variant, source: str) -> bool:
    return all(f"#define {name.upper()} {int(value)}\n" in source for name, value in variant._asdict().items())


class Fault(NamedTuple):
    """What a compiler makes of a piece of a variant's source: something else. `spec`: a call that it makes wrong."""

    old: str
    new: str
    spec: Spec = CAUSAL
    variant: simdgroup.Variant = DEFAULT

    def __call__(self, source: str) -> object:
        assert self.old in source
        return compile_shader(source.replace(self.old, self.new))


O = "o[r][FIRST + f]"
O_SUM = f"simdgroup_multiply_accumulate({O}, p[r][n], v[f], {O});"
IN_HALF = " UNROLL for (int e = 0; e < 2; ++e) X[e] = float(half(X[e]));".replace("X", f"{O}.thread_elements()")
STORED = "float factor = statistics.l > 0.0f ?"
FAULTS = {
    "swapped lanes": Fault("lane.column = short((index", "lane.column = 6 - short((index"),
    "a tail that is missing": Fault("bool seen = key < seqlen_k;", "bool seen = key < seqlen_k / 8 * 8;", FULL),
    "a tail that is too long": Fault("bool seen = key < seqlen_k;", "bool seen = true;", FULL),
    "scores summed in half": Fault(
        "float x = s[r][n].thread_elements()[e];", "float x = float(half(s[r][n].thread_elements()[e]));"
    ),
    "outputs summed in half": Fault(O_SUM, f"{{ {O_SUM}{IN_HALF} }}", Spec([(70, 70)], DIMS, std=(0.01, 1.0, 1e4))),
    "NaN tests folded away": Fault("nan_if_nonfinite != 0.0f", "false", MASKED),
    "tests for infinities folded away": Fault("m == -INFINITY ? 0.0f : m;", "m;", FEWER_KEYS),
    "rows 4 to 7 wrong": Fault(STORED, "float factor = lane.row < 4 && statistics.l > 0.0f ?"),
    "zeros": Fault(STORED, "float factor = false ?"),
    "nothing written": Fault("if (row < sequence.rows_q) {", "if (row < 0) {"),
    "an idle simdgroup": Fault("bool is_needed = ", "bool is_needed = simdgroup + 1 < SIMDGROUPS && "),
    "no rescaling": Fault("if (simd_any(m > state.m[r])) {", "if (state.m[r] == -INFINITY) {"),
    "a window that is too narrow": Fault("key <= row + scoring.offset", "key < row + scoring.offset"),
    "heads of k for those of q": Fault("head / int(params[HEADS_PER_KV_HEAD])", "head % 2"),
    "a log-sum-exp of another base": Fault("log2(row.l) / LOG2E", "log2(row.l)"),
    "a mask that is not read": Fault("return x ? s : -INFINITY;", "return s;", MASKED),
    "rows of no sequence": Fault("is_query ? log_sum_exp(statistics)", "true ? log_sum_exp(statistics)", PACKED),
    "half a block staged": Fault("i < COUNT * PIECES;", "i < COUNT * PIECES / 2;", CAUSAL, STAGED),
}


MORE = (
    "a tail that is too long",
    "nothing written",
    "a window that is too narrow",
    "heads of k for those of q",
    "a log-sum-exp of another base",
    "rows of no sequence",
)


def in_its_variant(fault):
    return lambda source: fault(source) if is_of(fault.variant, source) else compile_shader(source)


def assert_says(warning):
    """What was seen, in what and where, and what to do."""
    assert "the Metal kernel attention_forward gave a wrong result for a test problem on this machine" in warning
    assert f"torch {torch.__version__}" in warning
    assert re.search(r": (out|lse) is off by .*; .* is allowed\.", warning)
    assert "Please report" in warning


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.metal_full] * (name in MORE)) for name in FAULTS]
)
def test_a_miscompiled_kernel_never_serves_a_call(name, monkeypatch):
    """The next variant does, which has not the fault, after one warning."""
    fault = FAULTS[name]
    compiled_by(monkeypatch, in_its_variant(fault))
    monkeypatch.setenv(simdgroup.FORWARD.variable, str(fault.variant))
    variants.forget()
    monkeypatch.setenv(proved.PROVE, "off")
    with pytest.raises(AssertionError):  # it is a fault indeed
        served(fault.spec)
    monkeypatch.setenv(proved.PROVE, "once")
    compiler.clear()
    kernels, (warning,) = served(fault.spec)
    assert kernels == ["attention_forward"]
    assert_says(warning)
    assert [s.variant for s in compiler.failures] == [fault.variant]
    assert served(fault.spec) == (kernels, [])


@pytest.mark.parametrize("name", ["zeros", "NaN tests folded away"])
def test_where_all_variants_are_miscompiled_plain_pytorch_serves(name, monkeypatch):
    compiled_by(monkeypatch, FAULTS[name])
    kernels, (warning,) = served(FAULTS[name].spec)
    assert kernels == []
    assert_says(warning)
    assert [s.variant for s in compiler.failures] == [DEFAULT, *FALLBACKS]
    assert served(FAULTS[name].spec) == ([], [])


BACKWARD_FAULTS = {
    "attention_backward_rows": ("row_sum(SlabV::dot(do_row, out_row, lane))", "SlabV::dot(do_row, out_row, lane)"),
    "attention_backward_queries": ("- terms.z) * slope", "- 0.0f) * slope"),
    "attention_backward_keys": ("if (hidden) kept = change = 0.0f;", "if (hidden) change = 0.0f;"),
}


def gradients():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 33, 2, 8, requires_grad=True) for _ in range(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).square().sum(), (q, k, v))
    return found, [str(one.message) for one in caught]


@pytest.mark.parametrize("entry", BACKWARD_FAULTS)
def test_miscompiled_kernels_of_the_backward_pass_never_give_a_gradient(entry, monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "torch")
    expected, _ = gradients()
    monkeypatch.delenv("MTLFLASHATTN_KERNEL")
    fault = Fault(*BACKWARD_FAULTS[entry])
    compiled_by(monkeypatch, lambda source: (fault if f"kernel void {entry}(" in source else compile_shader)(source))

    def right(found):
        return all(torch.allclose(x, exact, rtol=1e-3, atol=1e-4) for x, exact in zip(found, expected, strict=True))

    monkeypatch.setenv(proved.PROVE, "off")
    assert not right(gradients()[0])
    monkeypatch.setenv(proved.PROVE, "once")
    compiler.clear()
    found, (warning,) = gradients()
    assert right(found)
    assert f"the Metal kernel {entry} gave a wrong result for a test problem" in warning
    assert {s.kernel.entry for s in compiler.failures} == {entry}


def test_a_forced_variant_proves_itself_too(monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_VARIANT", "8x1x16-direct")
    compiled_by(
        monkeypatch,
        lambda source: (
            FAULTS["rows 4 to 7 wrong"](source) if "#define SIMDGROUPS 1\n" in source else compile_shader(source)
        ),
    )
    kernels, (warning,) = served(CAUSAL)
    assert kernels == ["attention_forward"]
    assert "simdgroups=1" in warning


class Limited:
    """A compiler whose pipelines take so many threads and no more, as Metal's may (mlx#3885), and ValueError as torch
    raises it."""

    def __init__(self, most):
        self.most = most
        self.launched = []

    def __call__(self, source):
        return mock.Mock(attention_forward=self._function(compile_shader(source).attention_forward))

    def _function(self, function):
        def call(*values, threads, group_size):
            if group_size[0] > self.most:
                raise ValueError(f"Threadgroup size exceeds {self.most} limit")
            self.launched.append(group_size[0])
            function(*values, threads=threads, group_size=group_size)

        call.max_threads_per_threadgroup = self.most
        return call


@pytest.mark.parametrize("prove", ["once", "off"])
@pytest.mark.parametrize(
    ("most", "variant", "warned"),
    [(832, "8x8x16-direct", False), (512, "", False), (128, "8x8x16-direct", True), (64, "", True), (32, "", True)],
)
def test_pipelines_of_fewer_threads_get_smaller_groups(most, variant, warned, prove, monkeypatch):
    monkeypatch.setenv(proved.PROVE, prove)
    if variant:
        monkeypatch.setenv("MTLFLASHATTN_VARIANT", variant)
    limited = Limited(most)
    compiled_by(monkeypatch, limited)
    kernels, warnings_ = served(CAUSAL)
    assert kernels == ([] if most < 64 else ["attention_forward"])
    assert len(warnings_) == warned
    if warned:
        needed = 256 if variant else 128
        assert f"it needs {needed} threads in a group, and this GPU gives it {most} at most" in warnings_[0]
        assert "report" not in warnings_[0]
    assert all(group <= most for group in limited.launched)


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (RuntimeError("XPC_ERROR_CONNECTION_INTERRUPTED"), "Apple's compiler crashes on some large kernels."),
        (RuntimeError("Compilation failed: Compiler encountered an internal error"), "Apple's compiler crashes"),
        (SyntaxError("program_source:9:1: error: unknown type name 'bfloat'"), "Metal has bfloat16 from macOS 14 on."),
        (RuntimeError("Failed to create pipeline state object"), "Please report"),
    ],
)
@pytest.mark.parametrize("of_all", [True, False])
def test_a_variant_that_is_not_compiled_is_replaced(error, known, of_all, monkeypatch):
    def compile_(source):
        if of_all or is_of(DEFAULT, source):
            raise error
        return compile_shader(source)

    compiled_by(monkeypatch, compile_)
    kernels, (warning,) = served(CAUSAL)
    assert kernels == ([] if of_all else ["attention_forward"])
    assert known in warning
    assert ("Please report" in warning) == (known == "Please report")


def test_under_fast_math_the_warning_says_so(monkeypatch):
    monkeypatch.setenv("PYTORCH_MPS_FAST_MATH", "1")
    compiled_by(monkeypatch, FAULTS["tests for infinities folded away"])
    _, (warning,) = served(CAUSAL)
    assert "PYTORCH_MPS_FAST_MATH is set" in warning
    assert "Please report" not in warning


def test_virtual_machines_are_not_to_be_reported(monkeypatch):
    monkeypatch.setattr(gpu, "is_virtual", lambda: True)
    compiled_by(monkeypatch, FAULTS["zeros"])
    _, (warning,) = served(CAUSAL)
    assert "there is nothing to report" in warning
    assert "Please report" not in warning


@pytest.fixture
def trials(monkeypatch):
    """The specializations whose trials are made."""
    made = []
    ours = trial.forward

    def forward(s, *lengths):
        made.append(s)
        return ours(s, *lengths)

    monkeypatch.setattr(trial, "forward", forward)
    return made


def another_process(monkeypatch):
    compiler.clear()


def test_what_passed_is_not_asked_again(trials, monkeypatch):
    """Not in this process, nor in another; for other sources, another macOS, GPU, torch or math mode it is."""
    assert served(CAUSAL) == (["attention_forward"], [])
    served(CAUSAL)
    assert len(trials) == 1
    another_process(monkeypatch)
    served(CAUSAL)
    assert len(trials) == 1
    changes = [
        (gpu, "name", lambda: "Apple M9"),
        (gpu, "os_build", lambda: "99A1"),
        (torch, "__version__", "9.9"),
    ]
    for count, change in enumerate(changes, 2):
        monkeypatch.setattr(*change)
        another_process(monkeypatch)
        served(CAUSAL)
        assert len(trials) == count
    monkeypatch.setenv("PYTORCH_MPS_FAST_MATH", "1")
    another_process(monkeypatch)
    served(CAUSAL)
    assert len(trials) == 5
    ours = Specialization.source
    monkeypatch.setattr(Specialization, "source", lambda self: ours(self) + "// changed")
    another_process(monkeypatch)
    served(CAUSAL)
    assert len(trials) == 6
    assert len((store.directory() / "proved.txt").read_text().split()) == 6


def test_what_failed_is_not_remembered(trials, monkeypatch):
    compiled_by(monkeypatch, FAULTS["zeros"])
    served(CAUSAL)
    attempts = len(trials)
    assert attempts == 1 + len(FALLBACKS)
    assert not (store.directory() / "proved.txt").exists()
    another_process(monkeypatch)
    served(CAUSAL)
    assert len(trials) == 2 * attempts


@pytest.mark.parametrize(("choice", "expected"), [("off", [0, 0]), ("once", [1, 1]), ("always", [1, 2])])
def test_the_variable(choice, expected, trials, monkeypatch):
    monkeypatch.setenv(proved.PROVE, choice)
    counts = []
    for _ in range(2):
        served(CAUSAL)
        counts.append(len(trials))
        another_process(monkeypatch)
    assert counts == expected


def test_an_unknown_value_of_the_variable_warns_and_counts_as_once(trials, monkeypatch):
    monkeypatch.setattr(compiler, "_from_torch", compile_shader)
    monkeypatch.setenv(proved.PROVE, "twice")
    _, (warning,) = served(CAUSAL)
    assert "MTLFLASHATTN_PROVE=twice is not known; it counts as once. Known: off, once, always." in warning
    assert len(trials) == 1


def test_apples_compiler_is_asked_for_proofs_and_one_in_its_place_is_not(trials, monkeypatch):
    monkeypatch.delenv(proved.PROVE)
    served(CAUSAL)
    assert not trials
    monkeypatch.setattr(compiler, "_from_torch", compile_shader)
    compiler.clear()
    served(CAUSAL)
    assert len(trials) == 1


@pytest.mark.parametrize("content", [b"", b"\xff\x00 {}", b"0" * 100_000])
def test_a_broken_file_of_proofs_counts_as_none(content, trials, monkeypatch):
    store.directory().mkdir(exist_ok=True)
    (store.directory() / "proved.txt").write_bytes(content)
    assert served(CAUSAL)[1] == []
    assert len(trials) == 1
    another_process(monkeypatch)
    served(CAUSAL)
    assert len(trials) == 1


def test_a_cache_that_cannot_be_written_is_no_obstacle(trials, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(store.CACHE, str(tmp_path / "file"))
    for count in (1, 2):
        compiler.clear()
        kernels, warnings_ = served(CAUSAL)
        assert kernels == ["attention_forward"]
        assert not any("Metal kernel" in text for text in warnings_)
        assert len(trials) == count


def test_modes_of_the_caller_do_not_reach_the_trial(trials):
    """Autocast, inference, another default device and dtype, and a mode that sees every operation."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "randn" not in function.name()
            return function(*args, **(kwargs or {}))

    (s,) = recorded([partial(tiers.run, draw(CAUSAL).problem)])
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"), Count():
            compiled = compiler.kernel(s)
    finally:
        torch.set_default_dtype(default)
    assert compiled is not None, compiler.failures
    assert trials == [s]


def test_a_graph_is_captured_without_a_trial_and_makes_it_when_it_runs(trials):
    q, k, v = (torch.randn(1, 33, 2, 8) for _ in range(3))
    seen = []

    def noting(graph, inputs):
        seen.append(len(trials))
        return graph

    out = torch.compile(lambda q, k, v: flash_attn_func(q, k, v, causal=True), backend=noting, fullgraph=True)(q, k, v)
    assert seen == [0]
    assert len(trials) == 1
    torch.testing.assert_close(out, flash_attn_func(q, k, v, causal=True))
    assert not compiler.failures


def test_where_no_thread_can_be_started_the_caller_s_makes_the_trial(trials, monkeypatch):
    """At the end of the interpreter, say."""
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    kernels, warnings_ = served(CAUSAL)
    assert kernels[-1] == "attention_forward"
    assert warnings_ == []
    assert len(trials) == 1


def test_threads_that_meet_at_a_first_use_all_get_the_kernel():
    calls = [draw(CAUSAL) for _ in range(4)]
    results = [None] * len(calls)

    def run(n):
        results[n] = tiers.run(calls[n].problem)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for call, result in zip(calls, results, strict=True):
        call.check(result)
    assert not compiler.failures


def test_a_trial_that_cannot_be_made_is_a_refusal_and_no_error(monkeypatch):
    monkeypatch.setattr(trial, "problem", mock.Mock(side_effect=MemoryError("no room")))
    kernels, (warning,) = served(CAUSAL)
    assert kernels == []
    assert "failed on a test problem" in warning
    assert "MemoryError: no room" in warning


def test_a_trial_of_something_else_is_no_proof(monkeypatch):
    ours = trial.problem
    monkeypatch.setattr(trial, "problem", lambda s, *lengths, **how: ours(s._replace(softcap=True), *lengths, **how))
    kernels, (warning,) = served(CAUSAL)
    assert kernels == []
    assert "its trial is for" in warning


def recorded(calls) -> list[Specialization]:
    """What `calls` ask the compiler for, each once. Nothing is compiled."""
    found: dict[Specialization, None] = {}

    def kernel(s):
        found[s] = None
        return lambda *_, **__: None

    with mock.patch.object(compiler, "kernel", kernel):
        for call in calls:
            call()
    return list(found)


def forward_calls():
    """Of the grids on which the kernels are tested."""
    for number, case in enumerate([*cases(), *cases_of_every_variant()[::3]]):
        (spec,) = specs(case, number, 1)
        p = draw(spec).problem
        if "rows" in case:
            yield partial(launch.run, p, simdgroup.FORWARD, fitting(case))
        else:
            yield partial(launch.run, p, simdgroup.FORWARD, simdgroup.default(p.q.itemsize, *case["dims"]))
            yield partial(launch.run, p, scalar.FORWARD, scalar.VARIANT)
    for case in test_quantised.CASES:
        yield partial(launch.run, test_quantised.drawn(case).problem, *test_quantised.KERNELS[case["kernel"]])


def backward_calls():
    for number, case in enumerate([*backward_grid.cases()[::3], *backward_grid.cases_of_every_variant()[::9]]):
        yield partial(backward_grid.drawn(case, number).run, *backward_grid.variants(case), case["each_head"])


def decode_calls():
    for number, case in test_decode.ALL:
        for call, variant in test_decode.calls(case, number):
            yield partial(decode.run, call.problem, variant)


def append_calls():
    for case in test_append.CASES:
        plan = describe(test_append.built(case)[0])
        yield partial(cache_append.prepare, plan.new, plan.rotary, plan.queries)


CALLS = {"append": append_calls, "forward": forward_calls, "backward": backward_calls, "decode": decode_calls}


@pytest.mark.parametrize("grid", [grid for grid in CALLS if grid != "append"])  # which has a proof of its own
def test_every_specialization_has_a_trial_that_is_its_own(grid):
    every = recorded(CALLS[grid]())
    assert len(every) > 100
    for s in every:
        made = s.kernel.proof.trial(s)
        assert launch.arguments(s.kernel, made.problem, s.variant, made.tensors, made.parameters)[0] == s
        written = {name for name, buffer in s.kernel.buffers.items() if not buffer.type.startswith("const")}
        written = {name for name in written if made.tensors[name] is not None}
        if "partial_o" in s.buffers:  # in splits, or put together
            written &= {"partial_o", "partial_m_l"} if s.kernel in decode.DECODE.values() else {"out", "lse"}
        assert set(made.expected) == written
        assert all(made.tensors[name].isnan().all() for name in made.expected)
        for expected in made.expected.values():
            assert expected.value.isfinite().any()
            assert grid != "backward" or not expected.value.isnan().any()
        threads, group = s.kernel.grid(made.problem, s.variant)
        assert group == (s.threads, 1, 1), "what a pipeline is asked for is not what is launched"
        assert threads[0] // group[0] >= 2, "one tile has no neighbour"
        for x in (made.problem.k, made.problem.v):
            memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            assert s.kv_format or memory.isnan().any(), "nothing that must not be read"


@pytest.mark.parametrize("grid", CALLS)
def test_the_richest_specializations_of_each_kernel_pass(grid, monkeypatch):
    """With dropout and without. What a kernel hands to another must mean the same to its trial."""
    monkeypatch.setattr(checks, "readable", lambda _tensor: False)
    richest = {}
    for s in recorded(CALLS[grid]()):
        kind = s.kernel.entry, getattr(s, "dropout", False)
        rich = (len(s.buffers) + s[:-1].count(True) if max(s.head_dim, s.head_dim_v) <= 64 else -1), -s.head_dim
        if kind not in richest or rich > richest[kind][0]:
            richest[kind] = rich, s
    for _, s in richest.values():
        assert compiler.kernel(s) is not None, compiler.failures


@pytest.mark.metal_full
@pytest.mark.parametrize("grid", CALLS)
def test_every_kernel_of_the_grids_passes(grid, monkeypatch):
    monkeypatch.setenv(proved.PROVE, "always")
    for s in recorded(CALLS[grid]()):
        assert compiler.kernel(s) is not None, compiler.failures


@pytest.mark.parametrize(
    ("grid", "entry", "old", "new"),
    [
        ("append", "rotate_and_append", "x1 * sine)", "0.0f)"),
        ("append", "rotate_and_append", "at.row = row % params[PAGE_SIZE];", "at.row = 0;"),
        ("decode", "attention_decode", "bool seen = key < seqlen_k;", "bool seen = true;"),
        ("decode", "attention_combine", "part += SIMDGROUPS", "part += 2 * SIMDGROUPS"),
        ("decode", "attention_combine", "l += rescale * m_l.y;", "l += m_l.y;"),
    ],
)
def test_faults_of_the_kernels_around_attention_are_found(grid, entry, old, new, monkeypatch):
    monkeypatch.setattr(checks, "readable", lambda _tensor: False)
    s = next(s for s in recorded(CALLS[grid]()) if s.kernel.entry == entry and is_reached(s))
    assert compiler.kernel(s) is not None, compiler.failures
    compiled_by(monkeypatch, Fault(old, new))
    with pytest.warns(RuntimeWarning, match=f"{entry} gave a wrong result"):
        assert compiler.kernel(s) is None


@pytest.mark.parametrize("kv_format", ["e4m3", "e5m2"])
def test_subnormal_codes_that_a_gpu_takes_for_zero_are_found(kv_format, monkeypatch):
    decoded = "to[0] = even.x, to[1] = odd.x, to[2] = even.y, to[3] = odd.y;"
    flushed = f"{decoded} for (int i = 0; i < 4; ++i) to[i] = abs(to[i]) < 6.104e-5h ? 0.0h : to[i];"
    calls = (
        partial(launch.run, test_quantised.drawn(case).problem, *test_quantised.KERNELS[case["kernel"]])
        for case in test_quantised.CASES
    )
    of_format = [
        s for s in recorded(calls) if s.kv_format == kv_format and {"k_descale", "v_descale"} <= set(s.buffers)
    ]
    s = min(of_format, key=lambda s: s.head_dim + s.head_dim_v)
    assert compiler.kernel(s) is not None, compiler.failures
    compiled_by(monkeypatch, Fault(decoded, flushed))
    with pytest.warns(RuntimeWarning, match="gave a wrong result"):
        assert compiler.kernel(s) is None


def is_reached(s):
    """Does it run the lines in which faults are planted? Small ones first."""
    return s.dtype == "half" and (s.kernel.entry != "rotate_and_append" or {"cosines", "block_table"} <= set(s.buffers))


def test_every_kernel_has_a_proof():
    """Those of every module that there is."""
    modules = [import_module(f"{metal.__name__}.{found.name}") for found in pkgutil.iter_modules(metal.__path__)]
    kernels = {value for module in modules for value in vars(module).values() if isinstance(value, Program)}
    assert simdgroup.FORWARD in kernels
    assert {kernel for kernel in kernels if kernel.proof is None} == set()


def test_it_costs_little():
    """Host time of a trial without the kernel: 30 ms is the goal, and what a slow machine may take here is more."""
    (s,) = recorded([partial(tiers.run, draw(CAUSAL).problem)])
    seconds = min(timeit.repeat(lambda: s.kernel.proof(s, lambda *_, **__: None), number=1, repeat=5))
    assert seconds < 0.1
