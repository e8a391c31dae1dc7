"""What hides this project and is of no use: doctor says what is wrong with it, and how to get rid of it."""

import json

import pytest

from .environments import write

ON = {"MTLFLASHATTN_SHIM": "on"}

FULL = "def flash_attn_func(q, k, v):\n    return q\n"

FAULTS = {
    "empty": ({"flash_attn/__init__.py": ""}, "it lacks flash_attn_func", "delete "),
    "a checkout": (
        {
            "flash_attn/__init__.py": "from flash_attn.flash_attn_interface import flash_attn_func\n",
            "flash_attn/flash_attn_interface.py": f"import flash_attn_2_cuda as flash_attn_gpu\n{FULL}",
        },
        "it cannot be imported: its extension flash_attn_2_cuda is not there",
        "delete ",
    ),
    "another project's": (
        {
            "flash_attn/__init__.py": FULL,
            "fake_flash_attention-2.6.3.dist-info/METADATA": "Name: fake-flash-attention\nVersion: 2.6.3\n",
            "fake_flash_attention-2.6.3.dist-info/RECORD": "flash_attn/__init__.py,,\n",
        },
        "it belongs to fake-flash-attention 2.6.3, which is not FlashAttention",
        "pip uninstall fake-flash-attention",
    ),
    "a module": ({"flash_attn_interface.py": "x = 1\n"}, "it lacks flash_attn_func", "delete "),
}


def doctor(interpreter, **variables):
    done = interpreter.start("-m", "flash_attn_shim", "doctor", "--json", **{**ON, **variables})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", FAULTS)
def test_useless(installed, tmp_path, kind):
    files, fault, remedy = FAULTS[kind]
    write(tmp_path, files)
    found = doctor(installed, PYTHONPATH=tmp_path)
    hidden = next(name for name in found["names"] if not name["visible"])
    assert hidden["why"].startswith(f"a real installation has it, but {fault}")
    (said,) = [advice for advice in found["advice"] if "hides this project" in advice]
    assert fault in said
    assert f"Remove it: {remedy}" in said


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_a_useful_one_is_left_in_peace(installed, tmp_path, name):
    files = {"flash_attn": "flash_attn/__init__.py", "flash_attn_interface": "flash_attn_interface.py"}
    write(tmp_path, {files[name]: FULL})
    found = doctor(installed, PYTHONPATH=tmp_path)
    assert {each["name"]: each["why"] for each in found["names"]}[name] == "a real installation has it"
    assert not [advice for advice in found["advice"] if "hides" in advice]


def test_metadata_that_were_left_behind(installed, tmp_path):
    write(
        tmp_path, {"flash_attn-1.0.4.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash-attn\nVersion: 1.0.4\n"}
    )
    (said,) = [advice for advice in doctor(installed, PYTHONPATH=tmp_path)["advice"] if "1.0.4" in advice]
    assert "has metadata" in said
    assert f"delete {tmp_path / 'flash_attn-1.0.4.dist-info'}" in said
    assert not [advice for advice in doctor(installed)["advice"] if "metadata" in advice]
