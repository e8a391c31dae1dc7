"""PyTorch's own attention in `mtlflashattn doctor` and `mtlflashattn run`."""

import os
import subprocess
import sys

from flash_attn_mps import sdpa
from flash_attn_shim.commands import doctor, examine


def test_hazards_of_this_torch_and_the_switch():
    found = examine._sdpa()
    assert "MTLFLASHATTN_SDPA=on" in found["scaled_dot_product_attention"]
    (wrong,) = (value for name, value in found.items() if name.startswith("known MPS bugs"))
    assert any("pytorch#179352" in line for line in wrong)
    with sdpa.installed():
        assert examine._sdpa()["scaled_dot_product_attention"] == "served on MPS"
        assert "PyTorch's own attention" in doctor.render(examine.everything([]))


def test_run_serves_a_program_that_never_heard_of_this_package(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\n"
        "package = sys.modules.get('flash_attn_mps')\n"
        "print(package is not None and package.sdpa.is_installed(), sys.argv[1:])"
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
    assert printed == ["True ['x']", "False ['x']"]
