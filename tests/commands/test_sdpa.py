"""PyTorch's own attention in `mtlflashattn doctor` and `mtlflashattn run`."""

import os
import subprocess
import sys
import types

import torch.nn.functional as F

from flash_attn_mps import sdpa
from flash_attn_shim.commands import doctor, examine


def test_hazards_of_this_torch_and_the_switch():
    found = examine._sdpa()
    assert "MTLFLASHATTN_SDPA=on" in found["scaled_dot_product_attention"]
    (wrong,) = (value for name, value in found.items() if name.endswith("on MPS is wrong"))
    assert any("pytorch#179352" in line for line in wrong)
    with sdpa.installed():
        assert examine._sdpa()["scaled_dot_product_attention"] == "replaced"


def test_modules_that_took_torchs_function_are_named_with_advice(monkeypatch):
    module = types.ModuleType("some_model")
    module.sdpa = F.scaled_dot_product_attention
    monkeypatch.setitem(sys.modules, "some_model", module)
    with sdpa.installed():
        findings = examine.everything()
    assert "some_model.sdpa" in findings["sdpa"]["modules that took torch's function"]
    (advice,) = (line for line in findings["advice"] if "some_model.sdpa" in line)
    assert "mps_fa" in advice
    assert "PyTorch's own attention" in doctor.render(findings)


def test_run_serves_a_program_that_never_heard_of_this_package(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, torch.nn.functional as F\n"
        "print(type(F.scaled_dot_product_attention).__name__, sys.argv[1:], 'flash_attn_mps' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("MTLFLASHATTN_")}
    printed = [
        subprocess.run(
            [sys.executable, "-m", "flash_attn_shim", "run", *options, str(script), "x"],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for options in (["--sdpa"], [])
    ]
    assert printed == ["function ['x'] True", "builtin_function_or_method ['x'] False"]
