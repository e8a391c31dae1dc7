"""Who may use tensor operations: the gates in their order, and the probe, on a device that is imitated in Python."""

import functools
import platform
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn_mps.tiers.metal import (
    compiler,
    gpu,
    prove,
    proved,
    refusals,
    store,
    tensorops_gate,
    tensorops_probe,
)
from flash_attn_mps.tools import machine
from flash_attn_mps.tools.report import stages
from flash_attn_shim.commands import examine
from metal_host import compile_shader, observe
from tests.mac import mac

SIZES = {"left": (16, 16), "right": (16, 32), "destination": (16, 32)}


@pytest.fixture(autouse=True)
def _first_use(monkeypatch, tmp_path):
    monkeypatch.setenv(store.CACHE, str(tmp_path))
    monkeypatch.setenv(proved.PROVE, "once")
    monkeypatch.delenv("MTLFLASHATTN_KERNEL", raising=False)
    monkeypatch.setattr(compiler, "device_types", frozenset({"cpu"}))
    compiler.clear()
    yield
    compiler.clear()


class Device:
    """The probe's kernel in Python. `told`: what it reports, where each element is; `held`: where it is indeed, both
    of a case, a lane and an operand; `product`: of the operands and what is added to."""

    def __init__(self, told, held=None, product=lambda left, right, to: to + left @ right):
        self.told, self.held, self.product = told, held or told, product
        self.compiled = 0

    def __call__(self, source):
        self.compiled += 1
        return SimpleNamespace(tensorops_probe=self.run)

    def run(self, places, products, *tiles, threads, group_size):
        assert threads == (32 * len(tensorops_probe.CASES), 1, 1)
        assert group_size == (32, 1, 1)
        for n, case in enumerate(tensorops_probe.CASES):
            told, held = ({name: flat(of, case, name) for name in SIZES} for of in (self.told, self.held))
            for operand, name in enumerate(SIZES):
                capacity = told[name].shape[1]
                places[n, operand, :, 0] = capacity
                places[n, operand, :, 1 : 1 + capacity] = told[name][:, :32]
            operands = (
                moved(x, case.transposed, name, told[name], held[name]) for x, name in zip(tiles, SIZES, strict=True)
            )
            left, right, to = operands
            to = self.product(left, right, torch.zeros_like(to) if case.mode == "multiply" else to)
            products[n] = moved(to, False, "destination", held["destination"], told["destination"])


def flat(places, case, name):
    """The places of the elements of each lane, counted in rows; -1 for padding."""
    columns = 16 if name == "left" or (name == "right" and case.transposed) else 32
    found = [[-1 if at is None else at[0] * columns + at[1] for at in places(case, lane, name)] for lane in range(32)]
    return torch.tensor(found, dtype=torch.int32)


def moved(x, transposed, name, read, written):
    """Matrices whose elements are read at the ones, and written at the other places."""
    stored = x.mT.contiguous() if name == "right" and transposed else x
    out = torch.zeros_like(stored).flatten(1)
    out[:, written[read >= 0].long()] = stored.flatten(1)[:, read[read >= 0].long()]
    out = out.view_as(stored)
    return out.mT if name == "right" and transposed else out


def known(name):
    of = tensorops_probe._KNOWN[name]
    return lambda case, lane, operand: of(lane, case.transposed, operand)


def drawn(seed, padding=0):
    """Any layout: elements dealt to lanes at random, the same number to each; so many slots of each are padding."""
    dealt = {}
    for operand, (rows, columns) in SIZES.items():
        for transposed in (False, True):
            shape = (columns, rows) if operand == "right" and transposed else (rows, columns)
            order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
            elements = [divmod(int(n), shape[1]) for n in order] + [None] * (32 * padding)
            dealt[operand, transposed] = [elements[lane::32] for lane in range(32)]
    return lambda case, lane, operand: dealt[operand, case.transposed][lane]


def swapped(places, operand, of_cases=tensorops_probe.CASES):
    """`places` but for two elements of a lane, which are each other's."""

    def of(case, lane, name):
        found = list(places(case, lane, name))
        if name == operand and lane == 5 and case in of_cases:
            found[2], found[3] = found[3], found[2]
        return found

    return of


def asked(device, **how):
    """The layout, why the tier is closed, and warnings, on an M5."""
    with mac(**how) as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(compiler, "compile_shader", device)
        patch.setattr(compiler, "_from_torch", device)
        compiler.clear()
        found = tensorops_probe.layout(), tensorops_probe.why_closed()
        assert found == (tensorops_probe.layout(), tensorops_probe.why_closed())
    return *found, [str(one.message) for one in caught]


NEWER = {"chip": "Apple M9 Ultra", "macos": "28.0", "torch_version": "3.1.0.dev20280101"}


@pytest.mark.parametrize("how", [{}, NEWER, {"chip": "Apple A19 Pro"}])
@pytest.mark.parametrize("name", ["apple10", "legacy"])
def test_a_known_layout_is_told(name, how):
    assert asked(Device(known(name)), **how) == (name, [], [])


@pytest.mark.parametrize("padding", [0, 3, 40])
@pytest.mark.parametrize("seed", range(3))
def test_any_other_layout_is_the_generic_one(seed, padding):
    assert asked(Device(drawn(seed, padding))) == ("generic", [], [])


@pytest.mark.parametrize("operand", SIZES)
@pytest.mark.parametrize("case", [tensorops_probe.CASES[0], tensorops_probe.CASES[-1]])
def test_one_element_elsewhere_makes_a_layout_another(case, operand):
    places = swapped(known("apple10"), operand, (case,))
    assert asked(Device(places)) == ("generic", [], [])


def as_half(left, right, to):
    return (to.half() + left.half() @ right.half()).float()


FAULTS = {
    **{
        f"{operand}: two elements are not where they are said to be, {name}": Device(
            known(name), swapped(known(name), operand)
        )
        for operand in SIZES
        for name in ("apple10", "legacy")
    },
    "in one case only": Device(drawn(1), swapped(drawn(1), "right", tensorops_probe.CASES[2:3])),
    "nothing is added to": Device(known("apple10"), product=lambda left, right, to: left @ right),
    "the last of K is left out": Device(
        known("apple10"), product=lambda left, right, to: to + left[..., :15] @ right[:, :15]
    ),
    "sums in half precision": Device(known("apple10"), product=as_half),
    "NaN": Device(known("apple10"), product=lambda left, right, to: to + torch.nan),
    "said to be compiled for another layout": Device(known("apple10"), known("legacy")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_product_closes_the_tier_with_one_warning(name):
    layout, (reason,), (warning,) = asked(FAULTS[name])
    assert layout is None
    assert "its probe gave a wrong result for a test problem: multiply" in reason
    assert " is off by " in reason
    assert "the Metal kernel tensorops_probe gave a wrong result for a test problem on this machine" in warning
    assert "Apple M5 Max, macOS 26.2 (25C56), torch 2.14.1" in warning
    assert "Please report" in warning


def refused_by(error):
    def compile_(_source):
        raise error

    return compile_


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (SyntaxError("program_source:4:10: fatal error: 'metal_tensor' file not found"), "Please report"),
        (SyntaxError('program_source:9:2: error: "Metal 4 is needed, ..."'), "Unset PYTORCH_MPS_METAL_VERSION"),
        (RuntimeError("XPC_ERROR_CONNECTION_INTERRUPTED"), "Apple's compiler crashes"),
    ],
)
def test_a_probe_that_does_not_compile_closes_the_tier(error, known):
    layout, (reason,), (warning,) = asked(refused_by(error))
    assert layout is None
    assert reason == f"its probe did not compile: {error}"
    assert known in warning


def test_a_probe_that_does_not_run_closes_the_tier():
    device = Device(known("apple10"))
    device.run = lambda *_, **__: refused_by(ValueError("Threadgroup size exceeds 16"))("")
    layout, (reason,), (_,) = asked(device)
    assert layout is None
    assert "its probe failed on a test problem: ValueError: Threadgroup size exceeds 16" in reason


@pytest.mark.parametrize(
    ("how", "reasons"),
    [
        ({"macos": "26.1"}, ["needs macOS 26.2 or later, and this is macOS 26.1"]),
        ({"macos": "15.6.1"}, ["needs macOS 26.2 or later, and this is macOS 15.6.1"]),
        (
            {"torch_version": "2.10.0"},
            ["needs torch 2.11 or later, which compiles Metal 4, and this is 2.10.0"],
        ),
        (
            {"macos": "14.2", "torch_version": "2.9.1+abc", "chip": "Apple M2"},
            [
                "needs macOS 26.2 or later, and this is macOS 14.2",
                "needs torch 2.11 or later, which compiles Metal 4, and this is 2.9.1+abc",
            ],
        ),
        ({"macos": "", "chip": ""}, ["needs macOS 26.2 or later, and this is Linux"]),
    ],
)
@pytest.mark.parametrize("forced", [True, False])
def test_without_macos_and_torch_nobody_asks_the_device(how, reasons, forced, monkeypatch):
    if forced:
        monkeypatch.setenv("MTLFLASHATTN_KERNEL", "tensorops")
    device = Device(known("apple10"))
    assert asked(device, **how) == (None, reasons, [])
    assert not device.compiled


@pytest.mark.parametrize(
    ("chip", "reason"),
    [
        ("Apple M4 Max", "the GPU (Apple M4 Max) has no matrix units beside its ALUs, as M5 and later do"),
        ("Apple A18 Pro", "the GPU (Apple A18 Pro) has no matrix units beside its ALUs, as M5 and later do"),
        ("Apple chip", "the GPU (Apple chip) has no matrix units beside its ALUs, as M5 and later do"),
        ("Apple M5 (Virtual)", "the GPU is that of a virtual machine"),
    ],
)
def test_other_gpus_have_it_where_it_is_forced(chip, reason, monkeypatch):
    device = Device(known("legacy"))
    monkeypatch.setattr(tensorops_probe, "layout", lambda: None)  # only whoever tunes asks for it there
    assert asked(device, chip=chip) == (None, [reason], [])
    assert not device.compiled
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "device_types", frozenset({"cpu"}))
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "TensorOps")
    assert asked(device, chip=chip) == ("legacy", [], [])


def test_the_answer_is_kept_for_the_machine_and_asked_anew_on_another():
    device = Device(known("apple10"))
    assert asked(device)[0] == "apple10"
    assert asked(device) == ("apple10", [], [])
    assert device.compiled == 1
    legacy = Device(known("legacy"))
    others = [{"build": "25C99"}, {"chip": "Apple M5"}, {"torch_version": "2.15.0"}, {"macos": "26.3", "build": "25D1"}]
    for count, other in enumerate(others, 1):
        assert asked(legacy, **other) == ("legacy", [], [])
        assert legacy.compiled == count
    assert asked(device) == ("apple10", [], [])
    assert device.compiled == 1


@pytest.mark.parametrize(("choice", "compiled"), [("always", 2), ("once", 1), ("off", 1)])
def test_the_variable_of_proofs(choice, compiled, monkeypatch):
    """Without proofs the device is asked all the same, once: nobody else knows its layout."""
    monkeypatch.setenv(proved.PROVE, choice)
    device = Device(known("apple10"))
    assert asked(device) == asked(device) == ("apple10", [], [])
    assert device.compiled == compiled


def test_a_wrong_product_is_not_kept():
    fault = FAULTS["NaN"]
    fault.compiled = 0
    assert asked(fault)[0] is None
    assert asked(fault)[0] is None
    assert fault.compiled == 2
    assert asked(Device(known("apple10"))) == ("apple10", [], [])


def test_where_nothing_can_be_written_each_process_asks(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(store.CACHE, str(tmp_path / "file"))
    device = Device(known("apple10"))
    assert asked(device) == asked(device) == ("apple10", [], [])
    assert device.compiled == 2


def test_modes_of_the_caller_do_not_reach_the_probe():
    tensorops_probe._tiles.cache_clear()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"), FakeTensorMode():
            assert asked(Device(known("apple10"))) == ("apple10", [], [])
    finally:
        torch.set_default_dtype(default)
        tensorops_probe._tiles.cache_clear()


def test_after_the_first_time_an_answer_costs_a_look_up():
    with mac() as patch:
        patch.setattr(compiler, "compile_shader", Device(known("apple10")))
        assert tensorops_probe.why_closed() == []
        for module, function in [(gpu, "_sysctl"), (proved, "holds"), (compiler, "kernel"), (prove, "apart")]:
            patch.setattr(module, function, None)
        patch.setattr(tensorops_gate.os, "environ", None)
        assert tensorops_probe.why_closed() == []
        assert tensorops_probe.layout() == "apple10"


def test_doctor_and_report_have_the_words_of_the_gates():
    device = Device(known("legacy"))
    for how, words in [
        ({}, "used, legacy layout of cooperative tensors"),
        ({"macos": "15.6"}, "not used: needs macOS 26.2 or later, and this is macOS 15.6"),
        (
            {"chip": "Apple M1"},
            "not used: the GPU (Apple M1) has no matrix units beside its ALUs, as M5 and later do",
        ),
    ]:
        with mac(**how) as patch:
            patch.setattr(compiler, "compile_shader", device)
            assert examine._attention()["tensor operations"] == words
            assert stages.facts("cpu")["tensor operations"] == words


def test_macos_is_asked_from_sysctl():
    """Not `platform`, which says 16 on macOS 26 where Python was built before it (python/cpython#135675)."""
    with mac(macos="26.4", build="25E10") as patch:
        patch.setattr(platform, "mac_ver", lambda: ("16.4", ("", "", ""), "arm64"))
        patch.setattr(sys, "platform", "darwin")
        assert "macOS 26.4 (25E10)" in refusals.machine()
        assert machine.facts("cpu")["system"].startswith("macOS 26.4 ")


METAL4 = functools.partial(compile_shader, version="4.0")


def asked_of_the_runner(layout, compile_=METAL4):
    with mac() as patch, observe(layout=layout) as launches, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(compiler, "compile_shader", compile_)
        patch.setattr(prove, "apart", lambda function: function())  # another thread is not observed
        found = tensorops_probe.layout(), tensorops_probe.why_closed()
    return *found, [str(one.message) for one in caught], launches


@pytest.mark.parametrize("layout", ["apple10", "legacy", *range(20)])
def test_the_kernel_of_the_probe_under_every_layout(layout):
    """Instrumented: what it reads somebody has written, and it writes nothing twice."""
    expected = layout if layout in ("apple10", "legacy") else "generic"
    *found, launches = asked_of_the_runner(layout)
    assert found == [expected, [], []]
    assert [one.kernel for one in launches] == ["tensorops_probe"]


PLANTED = {
    "rows and columns of the right operand are swapped": (
        "B::template load<TRANSPOSED, T>",
        "B::template load<!TRANSPOSED, T>",
    ),
    "a product is made twice": ("operation.run(a, b, c);", "operation.run(a, b, c); operation.run(a, b, c);"),
    "no product is made": ("operation.run(a, b, c);", ""),
    "what is added to is forgotten": ("mode::MODE>", "mode::multiply>"),
    "two lanes have each other's elements": (
        "C::store(c, products + n * 512);",
        "for (ushort i = 0; i < c.get_capacity(); ++i) c[i] = simd_shuffle_xor(c[i], 1); "
        "C::store(c, products + n * 512);",
    ),
}


@pytest.mark.parametrize("layout", ["apple10", 3])
@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_of_the_runner_closes_the_tier(name, layout):
    def compile_(source):
        old, new = PLANTED[name]
        assert old in source
        return METAL4(source.replace(old, new))

    found, (reason,), (warning,), _ = asked_of_the_runner(layout, compile_)
    assert found is None
    assert "its probe gave a wrong result for a test problem: multiply" in reason
    assert "Please report" in warning


def test_below_metal_4_the_tier_is_closed_with_words():
    older = functools.partial(compile_shader, version="3.2")
    found, (reason,), (warning,), launches = asked_of_the_runner("apple10", older)
    assert found is None
    assert "its probe did not compile: " in reason
    assert "Metal 4 is needed, and an older version is asked for" in reason
    assert "Unset PYTORCH_MPS_METAL_VERSION, or update torch." in warning
    assert not launches
