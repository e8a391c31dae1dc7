"""`mtlflashattn report`: every stage, what fails in one, what must not be in it, and what changed since another."""

import copy
import functools
import getpass
import json
import math
import os
import re
import socket

import pytest
import torch

from flash_attn_mps import timing
from flash_attn_mps.sdpa import hazards as known_hazards
from flash_attn_mps.tiers import reference
from flash_attn_mps.tiers.metal import compiler, gpu, proved, simdgroup, store, tensorops, tune, variants
from flash_attn_mps.tools.bench import workloads
from flash_attn_mps.tools.bench.workloads import Workload
from flash_attn_mps.tools.report import compare, hazards, page, probes, stages
from flash_attn_mps.tools.selftest import cases
from flash_attn_mps.tools.selftest.cases import Case
from flash_attn_mps.tools.selftest.unproved import unproved
from flash_attn_shim.commands import main
from metal_host import compile_shader
from tests.mac import mac
from tests.replaced_tiers import replace_tier

from .test_bench import Checker

SMALL = [
    Workload("prefill", "float32", 16, 2, 2, ((40, 40),)),
    Workload("training", "float32", 16, 2, 2, ((40, 40),)),
]


@pytest.fixture
def small(monkeypatch):
    """A report of a few seconds."""
    chosen = [
        Case("torch", dtype, 16, 16, feature) for dtype in ("bfloat16", "float32") for feature in ("full", "pages")
    ]
    monkeypatch.setattr(cases, "cases", lambda level, metal: iter(chosen))
    monkeypatch.setattr(workloads, "workloads", lambda kind, full: list(SMALL))
    monkeypatch.setattr(stages, "_CPU_SCALE", 1 / 65536)
    return chosen


@pytest.fixture
def run(small, tmp_path, capsys):
    """Runs the command: its status, the JSON file, the page and what was printed."""

    def run(*arguments):
        files = {"json": tmp_path / "report.json", "html": tmp_path / "report.html"}
        written = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
        status = main(["report", "--device", "cpu", "--minutes", "3", *written, *arguments])
        found = json.loads(files["json"].read_text(), parse_constant=pytest.fail)
        return status, found, files["html"].read_text(), capsys.readouterr()

    return run


def test_without_metal_it_reports_the_rest_and_says_so(run):
    status, data, _, printed = run()
    assert status == 0, printed
    assert list(data) == ["format", "machine", "selftest", "seconds", "hazards", "probes", "tune", "bench"]
    assert data["machine"]["torch"] == torch.__version__
    assert data["machine"]["Metal"] == "not tested: Metal kernels run on mps, not on cpu"
    assert (data["selftest"]["cases"], data["selftest"]["of"], data["selftest"]["failed"]) == (4, 4, 0)
    assert [row["issue"] for row in data["hazards"]["rows"]] == list(hazards.ISSUES)
    assert {"memory, copied", "torch's product, float16"} <= set(data["probes"])
    assert data["tune"] == {"skipped": "Metal kernels run on mps, not on cpu"}
    assert {m["workload"] for m in data["bench"]} == {w.name for w in SMALL}
    assert "selftest: 4 of 4 cases, all passed" in printed.out
    assert "Please attach both to an issue" in printed.out


def test_the_page_stands_alone(run):
    _, data, html, _ = run()
    found = Checker(html)
    assert {"svg", "table", "style"} <= set(found.tags)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not any(name in ("src", "href") or name.startswith("on") for name, _ in found.attributes)
    assert ("name", "viewport") in found.attributes
    assert "prefers-color-scheme: dark" in html
    assert "max-width: 36rem" in html, "a phone"
    words = " ".join(found.text)
    for name, value in data["machine"].items():
        assert name in words
        assert value in words
    assert "4 of 4 cases, all passed" in words
    assert all(issue in words for issue in hazards.ISSUES)
    assert all(name in words for name in data["probes"])


def test_with_metal_every_stage_has_its_part(metal, cache, small, run, monkeypatch):
    """Kernels on the runner, `tune` with a winner of the test's own."""
    small[:] = [Case("simdgroup", "float16", 16, 16, "full")]
    monkeypatch.setattr(workloads, "workloads", lambda kind, full: SMALL[:1])
    winner = store.Winner("8x2x16-direct", 1e-3, 2e-3)
    monkeypatch.setattr(tune, "briefly", lambda p, kernel: winner)
    wanted = ("Metal", "lanes of an 8x8 matrix", "8x8 products, float16", "attention_forward, float16, head dim 64")
    all_of_them = probes.of
    monkeypatch.setattr(probes, "of", lambda *how: {name: all_of_them(*how)[name] for name in wanted})
    status, data, html, printed = run()
    assert status == 0, printed
    assert "Metal" not in data["machine"]
    assert data["selftest"]["outcomes"] == {"simdgroup float16 right": 1}
    assert "NaN and infinities honoured, simdgroups of 32" in data["probes"]["Metal"]
    assert data["probes"]["lanes of an 8x8 matrix"] == "in the order expected"
    assert data["probes"]["8x8 products, float16"].endswith(" TF/s")
    assert "128 threads of 128 at most" in data["probes"]["attention_forward, float16, head dim 64"]
    assert [w["variant"] for w in data["tune"]["winners"]] == ["8x2x16-direct"] * 4
    assert "8x2x16-direct" in html


def test_every_probe_says_something(metal):
    """Sizes of next to nothing, a clock that stands; pipelines once, since each is compiled."""

    def clock(call, times):
        call()
        return 1e-3

    found = probes.of("cpu", clock, 1e-9)
    once = [name for name in found if "head dim" not in name] + ["attention_decode, float32, head dim 64"]
    for name in once:
        text = probes.found(found[name])
        assert text.endswith((" TF/s", " us", "written", "expected", "32", "ms")), (name, text)


def test_where_there_are_tensor_operations_the_report_has_theirs(metal, small, cache, monkeypatch):
    """Their rate, the kernel that uses them, and its tuning."""
    kernels = []
    winner = store.Winner("16x4x32", 1e-3, 2e-3)
    monkeypatch.setattr(tune, "briefly", lambda p, kernel: kernels.append(kernel) or winner)

    def clock(call, times):
        call()
        return 1e-3

    for chip, kernel in (("Apple M5", tensorops.FORWARD), ("Apple M4", simdgroup.FORWARD)):
        with mac(chip=chip) as patch:
            patch.setattr(compiler, "compile_shader", functools.partial(compile_shader, version="4.0"))
            found = probes.of("cpu", clock, 1e-9)
            names = [f"16x32x16 products, {dtype}" for dtype in ("float16", "bfloat16")]
            assert all(found[name]().endswith(" TF/s") for name in names)
            if chip == "Apple M5":
                pipeline = found["attention_tensorops, float16, head dim 64"]()
                assert re.match(
                    r"16x4x32: 128 threads of 128 at most, .* compiled in \d+ ms, proved in \d+ ms", pipeline
                )
            assert "attention_tensorops, float32, head dim 64" not in found
            stages._tune("cpu", 10.0)
            assert set(kernels) == {kernel}
            kernels.clear()
            variants.forget()
    assert not any("tensorops" in name or "16x32x16" in name for name in probes.of("cpu", clock, 1e-9))


def test_a_wrong_result_is_found_and_the_status_says_so(run, monkeypatch):
    def off(p):
        result = reference_run(p)
        result.out.mul_(1.5)
        return result

    reference_run = reference.run
    replace_tier(monkeypatch, "torch", run=off)
    status, data, html, printed = run()
    assert status == 1
    assert data["selftest"]["failed"] == 4
    assert "4 FAILED" in printed.out
    assert "Something is wrong here. Please attach both" in printed.out
    assert "torch:float32:16:16:pages" in html


def test_what_a_stage_raises_is_what_is_reported_of_it(run, monkeypatch):
    def broken(device):
        raise RuntimeError(
            f"no such file: '{os.path.expanduser('~')}/work/secret project/x.metal' and /Users/jane/x.py"
        )

    monkeypatch.setattr(hazards, "run", broken)
    status, data, html, printed = run()
    assert status == 1
    assert data["hazards"] == {"error": "RuntimeError: no such file: '.../x.metal' and .../x.py"}
    assert "hazards: RuntimeError" in printed.out
    assert data["bench"], "the stages after it have run"
    assert "no such file" in html


def test_each_stage_is_written_before_the_next_begins(small, tmp_path, monkeypatch):
    """Of a machine that hangs there is what was done before."""

    def interrupted(device):
        seen.append(json.loads((tmp_path / "report.json").read_text()))
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(hazards, "run", interrupted)
    assert main(["report", "--device", "cpu", "--minutes", "3", "--json", str(tmp_path / "report.json")]) == 1
    assert seen[0]["selftest"]["cases"] == 4


def test_nothing_in_it_names_a_person_a_machine_or_a_folder(run):
    _, data, html, _ = run()
    text = json.dumps(data)
    hidden = {os.path.expanduser("~"), os.getcwd(), socket.gethostname(), f"/{getpass.getuser()}/", "/Users/", "/home/"}
    for secret in hidden - {"", "/", "localhost"}:
        assert secret not in text
        assert secret not in html
    assert not any(word in text.lower() for word in ("serial", "hostname", "uuid"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Errno 2] No such file: '/Users/jane doe/a/b.py'", "[Errno 2] No such file: '.../b.py'"),
        ("~/Library/Caches/mtlflashattn is full", ".../mtlflashattn is full"),
        ("/opt/python/lib/torch/x.py:17: oops", ".../x.py:17: oops"),
        ("12.5 GB/s, TF/s, q/k and 8/2", "12.5 GB/s, TF/s, q/k and 8/2"),
        ("program_source:7:1: error: /* no */", "program_source:7:1: error: /* no */"),
    ],
)
def test_paths_lose_their_folders(text, expected):
    assert stages.plain({"a": [text]}) == {"a": [expected]}


def test_what_json_has_not_becomes_large():
    assert stages.plain((math.inf, math.nan, 1.5, None, True)) == [1e300, 1e300, 1.5, None, True]


def test_the_selftest_leaves_kernels_that_prove_themselves(metal, monkeypatch):
    """It runs them as they are: a kernel that fails its proof would be replaced, and nobody would see how."""
    monkeypatch.setenv(proved.PROVE, "always")
    with unproved():
        assert proved.wanted() == "off"
        compiler.failures["kernel"] = "why"
    assert proved.wanted() == "always"
    assert not compiler.failures
    monkeypatch.delenv(proved.PROVE)
    with unproved():
        pass
    assert proved.PROVE not in os.environ


def test_bfloat16_comes_last_and_has_its_share_of_the_time(small, monkeypatch):
    order = []
    monkeypatch.setattr(stages.selftest, "run", lambda case, device: order.append(case.dtype) or right(case))
    right = lambda case: stages.selftest.Outcome(case, "right")  # noqa: E731
    found = stages._selftest("cpu", 100.0)
    assert order == ["float32", "float32", "bfloat16", "bfloat16"]
    assert found["cases"] == 4
    order.clear()
    assert stages._selftest("cpu", 0.0)["cases"] == 0, "no time, no case"


def test_a_hazard_that_should_not_be_is_surprising():
    row = hazards.Row("pytorch#1", "", holds=True, torch=1.0, ours=0.0, allowed=0.1)
    assert not row.surprising
    assert row._replace(holds=False).surprising
    assert row._replace(ours=math.inf).surprising
    assert {hazard.issue for hazard in known_hazards.TABLE} - set(hazards.ISSUES) == {"pytorch#179352"}


def test_what_torch_raises_or_shapes_wrongly_is_infinitely_wrong():
    exact = torch.zeros(1, 2, 3, 4, dtype=torch.float64)

    def raises(arguments):
        raise RuntimeError("not on this device")

    for attend in (raises, lambda _: torch.zeros(1), lambda _: torch.full((1, 2, 3, 4), torch.nan)):
        assert hazards._error(attend, None, exact) == math.inf


@pytest.fixture
def before(run):
    return run()[1]


def test_a_second_run_says_what_changed_by_itself(before, run, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    _, _, html, printed = run()
    assert f"changed: torch: {before['machine']['torch']} -> 9.9.0" in printed.out
    assert "What changed since the report before" in html
    assert "9.9.0" in html


def test_changes_of_every_stage(before):
    now = copy.deepcopy(before)
    assert compare.changes(before, now) == []
    now["machine"]["macOS build"] = "25B78"
    failure = {"case": "simdgroup:float16:64:64:full", "status": "wrong", "error, of allowed": 9.0, "detail": "out"}
    now["selftest"]["failures"] = [failure]
    now["hazards"]["rows"][0]["torch"] = 1e300
    now["probes"]["memory, copied"] = "9999.0 GB/s, read and written"
    winner = {"call": "float16", "variant": "8x2x16-direct", "seconds": 1e-3, "default_seconds": 2e-3}
    now["tune"] = {"winners": [winner]}
    slower, absent = now["bench"][:2]
    slower["median seconds"] *= 3
    del absent["median seconds"]
    absent["why not"] = "it does not compile"
    found = {change.what: change for change in compare.changes(before, now)}
    assert found["macOS build"][1:] == ("-", "25B78", False)
    assert found["self-test, simdgroup:float16:64:64:full"][1:] == ("no failure", "wrong", True)
    assert found[f"{hazards.ISSUES[0]}, torch"][1:] == ("right", "wrong", True)
    assert found["memory, copied"].now == "9999.0 GB/s, read and written"
    slow = found[f"{slower['workload']}: {slower['contender']}"]
    assert slow.worse
    assert slow.now.endswith("3.00x as long")
    assert found[f"{absent['workload']}: {absent['contender']}"][1:] == ("runs", "it does not compile", True)
    back = {change.what: change for change in compare.changes(now, before)}
    assert back["self-test, simdgroup:float16:64:64:full"][1:] == ("wrong", "no failure", False)
    assert back[slow.what].now.endswith("3.00x as fast")
    assert "fastest variant, float16" not in found, "there was none before"
    later = copy.deepcopy(now)
    later["tune"]["winners"][0]["variant"] = "16x4x32-direct"
    assert [change[:3] for change in compare.changes(now, later)] == [
        ("fastest variant, float16", "8x2x16-direct", "16x4x32-direct")
    ]
    Checker(page.render(now, compare.changes(before, now)))


def test_noise_is_no_change(before):
    now = copy.deepcopy(before)
    for m in now["bench"]:
        if "median seconds" in m:
            m["median seconds"] *= 1.03
    assert compare.changes(before, now) == []


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}', "not json"])
def test_a_file_that_is_no_report_is_said(content, tmp_path, capsys):
    (tmp_path / "old.json").write_text(content)
    arguments = ["report", "--device", "cpu", "--against", str(tmp_path / "old.json")]
    assert main(arguments) == 2
    assert "is no report" in capsys.readouterr().err


def test_a_report_of_another_shape_is_compared_as_far_as_it_goes(before):
    """A stage that failed, or that an earlier version did not have."""
    for name in ("selftest", "hazards", "probes", "tune", "bench"):
        for broken in ({"error": "RuntimeError: x"}, None):
            other = {**before, name: broken} if broken else {k: v for k, v in before.items() if k != name}
            compare.changes(other, before)
            compare.changes(before, other)
            Checker(page.render(other, []))


def test_a_stage_that_went_wrong_stands_out(before):
    assert '<tr class="wrong">' not in page.render(before, None).partition("What this machine could do")[0]
    wrong = copy.deepcopy(before)
    wrong["selftest"]["failed"] = 1
    wrong["hazards"]["rows"][0]["torch"] = stages.INFINITE
    html = page.render(wrong, None)
    assert '<tr class="wrong"><td class="word">selftest</td>' in html
    assert "1e+300" not in html
    assert ">infinite<" in html
    assert not page.is_right(wrong)
    assert page.is_right(before)


def test_virtual_machines_are_told_apart(monkeypatch):
    monkeypatch.setattr(gpu, "is_virtual", lambda: True)
    assert "not this project's" in stages.facts("cpu")["virtual"]


def test_a_device_that_is_not_there(capsys):
    assert main(["report", "--device", "nonsense"]) == 2
    assert "--device nonsense: " in capsys.readouterr().err


def test_the_clock_of_probes_is_the_fastest_of_some_rounds():
    times = iter([3.0, 2.0, 5.0, 4.0, 6.0])
    assert probes._best(lambda call, count: next(times), lambda: None, 1) == 2.0
    assert timing.stopwatch("cpu")(lambda: None, 1) >= 0
