"""The `mtlflashattn` command, in processes of its own."""

import json
import os
import re
import subprocess
import sys

import pytest

from flash_attn_shim.commands import examine


def mtlflashattn(*arguments, flags=(), **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MTLFLASHATTN_")}
    return subprocess.run(
        [sys.executable, *flags, "-m", "flash_attn_shim", *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def findings(**environment):
    result = mtlflashattn("doctor", "--json", **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_doctor_says_that_the_shim_serves_and_from_where():
    found = findings(MTLFLASHATTN_SHIM="on")
    flash_attn = found["names"][0]
    assert flash_attn["visible"]
    assert flash_attn["origin"].endswith(os.path.join("presents", "flash_attn", "__init__.py"))
    assert found["hook"]["metadata of flash-attn"] == "announced"
    assert any("is True" in line for line in found["libraries"]["transformers"])


def test_doctor_names_the_switch_that_is_off():
    found = findings(MTLFLASHATTN_SHIM="off")
    assert not found["names"][0]["visible"]
    assert "MTLFLASHATTN_SHIM=off" in found["names"][0]["why"]
    assert any("is False" in line for line in found["libraries"]["transformers"])


def test_doctor_in_plain_words_and_its_advice():
    text = mtlflashattn("doctor", MTLFLASHATTN_SHIM="perhaps").stdout
    assert text.startswith("import flash_attn  ->  ")
    assert "MTLFLASHATTN_SHIM=perhaps is not a known value and counts as auto" in text


@pytest.mark.skipif(sys.platform == "darwin", reason="on a Mac the platform is no obstacle")
def test_doctor_names_the_platform():
    assert "not macOS on arm64" in findings()["names"][0]["why"]


def test_doctor_finds_a_real_installation(tmp_path):
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("")
    found = findings(MTLFLASHATTN_SHIM="on", PYTHONPATH=str(tmp_path))["names"][0]
    assert not found["visible"]
    assert found["origin"] == str(package / "__init__.py")
    assert "real installation" in found["why"]


def test_doctor_reports_a_hidden_start_up_file(monkeypatch):
    class Hidden:
        st_flags = 0x8000

    monkeypatch.setattr(examine, "_hook_paths", lambda: ["/site/mtlflashattn.pth"])
    monkeypatch.setattr(examine.os, "stat", lambda path: Hidden)
    status = examine.flash_attn_shim.status()
    hook = examine._hook(status)
    assert hook["start-up files"] == {"/site/mtlflashattn.pth": "hidden: Python skips it"}
    found = {"hook": hook, "system": {"machine": "arm64"}, "attention": {"torch": "2.13"}}
    found["names"] = [{"name": "flash_attn", "visible": False, "why": ""}]
    assert any("chflags nohidden '/site/mtlflashattn.pth'" in advice for advice in examine._advice(status, found))


def test_doctor_without_site_says_how_to_install_the_hook(tmp_path):
    paths = os.pathsep.join(path for path in sys.path if path)
    result = mtlflashattn("doctor", flags=("-S",), PYTHONPATH=paths, MTLFLASHATTN_SHIM="on")
    assert "Python runs with -S" in result.stdout, result.stderr
    assert "flash_attn_shim.install()" in result.stdout


def test_doctor_with_a_broken_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('no such library')")
    found = findings(MTLFLASHATTN_SHIM="on", PYTHONPATH=str(tmp_path))
    assert "RuntimeError: no such library" in found["attention"]["torch"]
    assert any("pip install torch" in advice for advice in found["advice"])


def test_run_installs_the_hook_and_passes_arguments(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, flash_attn, helper\nprint(flash_attn.__version__, sys.argv[1:], __name__, helper.here)"
    )
    (tmp_path / "helper.py").write_text("here = True")
    result = mtlflashattn("run", str(script), "--flag", "x", MTLFLASHATTN_SHIM="on")
    assert result.stdout.strip() == "2.8.3 ['--flag', 'x'] __main__ True", result.stderr


def cut(*arguments, together=False, **environment):
    """The command with its output into a pipe that nobody reads any more: (exit status, what it said on stderr)."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "flash_attn_shim", *arguments],
            env={**os.environ, **environment},
            stdout=writer,
            stderr=subprocess.STDOUT if together else subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writer)
    return process.returncode, process.stderr


COMMANDS = {
    "doctor": ["doctor"],
    "json": ["doctor", "--json"],
    "selftest": ["selftest", "--device", "cpu", "--case", "torch:float16:64:64:causal"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_whose_output_is_cut_ends_quietly(command, tmp_path):
    report = ["--json", str(tmp_path / "report.json")] if command == "selftest" else []
    assert cut(*COMMANDS[command], *report) == (1, "")
    assert cut(*COMMANDS[command], *report, PYTHONUNBUFFERED="1") == (1, "")


def test_help_that_is_cut_ends_quietly():
    """argparse itself drops what it cannot write, so where nothing is buffered it takes the status for its own."""
    assert cut("--help")[1] == ""
    assert cut("doctor", "--help", PYTHONUNBUFFERED="1")[1] == ""


def test_a_cut_stderr_is_quiet_too():
    assert cut("tune", together=True) == (1, None)


@pytest.mark.parametrize("ending", ["", "sys.exit(3)"])
def test_a_script_whose_output_is_cut_ends_quietly(tmp_path, ending):
    script = tmp_path / "program.py"
    script.write_text(f"import sys\nprint('x' * 100_000)\n{ending}")
    assert cut("run", str(script)) == (1, "")
    script.write_text(f"import sys\nprint('x')\n{ending}")
    assert cut("run", str(script)) == (1, "")


def test_another_broken_pipe_of_a_script_is_its_own(tmp_path):
    script = tmp_path / "program.py"
    script.write_text("import os\nr, w = os.pipe()\nos.close(r)\nos.write(w, b'x')\n")
    result = mtlflashattn("run", str(script))
    assert result.returncode == 1
    assert "BrokenPipeError" in result.stderr


def traced(program):
    """What MTLFLASHATTN_TRACE prints: the line with the totals, the rows of the two tables."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MTLFLASHATTN_TRACE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    totals, *lines = run.stderr.splitlines()
    rows = [re.split("  +", line) for line in lines]
    starts = [n for n, row in enumerate(rows) if row[0] in ("dtype", "passed over")]
    assert [rows[n] for n in starts] == [
        ["dtype", "head dim", "seqlen q", "seqlen k", "features", "pass", "tier", "calls"],
        ["passed over", "pass", "why", "calls"],
    ]
    return totals, rows[1 : starts[1]], rows[starts[1] + 1 :]


def test_trace_counts_calls_by_shape_and_tier():
    program = (
        "import torch, flash_attn_mps as fa\n"
        "q = torch.randn(1, 8, 2, 16)\n"
        "fa.flash_attn_func(q, q, q, causal=True)\n"
        "fa.flash_attn_func(q, q, q, causal=True)\n"
        "fa.flash_attn_func(q, q, q, softcap=5.0, window_size=(3, 0))\n"
        "from flash_attn_mps import describe, dispatch, problem\n"
        "p = describe.dense(q, q, q, describe.CallOptions())\n"
        "p = problem.with_sinks(problem.with_mask(p, torch.ones(8, 8, dtype=torch.bool)), torch.zeros(2))\n"
        "dispatch.attention(p)\n"
    )
    totals, rows, _ = traced(program)
    assert totals == "mtlflashattn: 4 attention calls, 0 with gradients"
    assert ["float32", "16", "8", "8", "causal", "forward", rows[0][-2], "2"] in rows
    assert ["float32", "16", "8", "8", "window(3,0)+softcap", "forward", "torch", "1"] in rows
    assert ["float32", "16", "8", "8", "full+mask+sinks", "forward", "torch", "1"] in rows


def test_trace_tells_who_computed_gradients_and_who_did_not():
    program = (
        "import torch, flash_attn_mps as fa\n"
        "q = torch.randn(1, 8, 2, 16, requires_grad=True)\n"
        "fa.flash_attn_func(q, q, q, softcap=5.0).sum().backward()\n"
        "fa.flash_attn_func(q, q, q, softcap=5.0)\n"
    )
    totals, rows, passed_over = traced(program)
    assert totals == "mtlflashattn: 2 attention calls, 1 with gradients"
    call = ["float32", "16", "8", "8"]
    assert rows == [
        [*call, "full+softcap+gradients", "forward", "torch", "2"],
        [*call, "full+softcap", "backward", "torch", "1"],
    ]
    assert ["cpu", "forward", "does not support softcap", "2"] in passed_over
    assert ["cpu", "backward", "does not support softcap", "1"] in passed_over
    assert [row[0] for row in passed_over].count("simdgroup") == 2


def test_demo_equals_eager_and_finds_the_switch():
    result = mtlflashattn("demo")
    assert result.returncode == 0, result.stdout + result.stderr
    question, nearest = result.stdout.split("How do I switch it off?\n")[1].splitlines()[:2]
    assert "MTLFLASHATTN_SHIM=off" in question + nearest
    assert "below 0.001" in result.stdout


def test_demo_respects_the_switch():
    result = mtlflashattn("demo", MTLFLASHATTN_SHIM="off")
    assert result.returncode == 2
    assert "MTLFLASHATTN_SHIM=off" in result.stderr


TRAINING = """
from flash_attn_mps import tiers
from flash_attn_shim.commands import demo, main
demo._readme_sentences = lambda text: ["Cats purr.", "It rains.", "Rain is wet.", "Cats are soft.", "Stop."]
print(main(["demo", "--train", "--steps", "3"]))
right = tiers.reference.backward
def wrong(*arguments):
    gradients = right(*arguments)
    return gradients._replace(dv=-gradients.dv)
object.__setattr__(tiers.BY_NAME["torch"], "backward", wrong)
print(main(["demo", "--train", "--steps", "3"]))
"""


def test_demo_trains_as_eager_does_and_notices_a_wrong_gradient():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MTLFLASHATTN_")}
    command = [sys.executable, "-W", "ignore", "-c", TRAINING]
    # Of several threads that share a core with other tests, each waits for the others.
    result = subprocess.run(
        command, env={**clean, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    right, wrong, rest = re.split(r"^(?:0|1)\n", result.stdout, flags=re.MULTILINE)
    assert rest == ""
    assert "3 steps of 2 pairs" in right
    losses = [[float(word) for word in line.split()[2:]] for line in right.splitlines() if line.startswith("step ")]
    first, _, last = losses
    assert all(after < before for before, after in zip(first, last, strict=True) if before > 0.1)
    assert last[3] != last[4] != last[0]  # dropout is on
    # Six layers, three steps, two columns of texts.
    assert re.search(r"dropout\S+ +backward +\S+ +36$", right, re.MULTILINE)
    assert "below 0.001" in right
    assert "NOT below 0.001" not in right
    assert "NOT below 0.001" in wrong
