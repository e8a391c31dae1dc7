"""Flags of programs: set where the shim would lead the program astray, and nowhere else."""

import json
import textwrap

import pytest

from flash_attn_shim.adjust.flags import TABLE
from flash_attn_shim.autoload import FLAGGED

from .environments import write

ON = {"MTLFLASHATTN_SHIM": "on"}

# In the shape of Wan's attention file: two probes, a path that insists on CUDA, and another one.
WAN = """
    import importlib.util
    FLASH_ATTN_3_AVAILABLE = importlib.util.find_spec("flash_attn_interface") is not None
    FLASH_ATTN_2_AVAILABLE = importlib.util.find_spec("flash_attn") is not None

    def flash_attention(q):
        assert q.device.type == "cuda"
        return 3 if FLASH_ATTN_3_AVAILABLE else 2

    def attention(q):
        if FLASH_ATTN_2_AVAILABLE or FLASH_ATTN_3_AVAILABLE:
            return flash_attention(q)
        return functional.scaled_dot_product_attention(q)
    """

PACKAGE = {"wan/__init__.py": "", "wan/modules/__init__.py": "", "wan/modules/attention.py": WAN}

FLAGS = """
import importlib, sys
def flags(name="wan.modules.attention"):
    module = importlib.import_module(name)
    return module.FLASH_ATTN_2_AVAILABLE, module.FLASH_ATTN_3_AVAILABLE
"""


@pytest.fixture
def wan(tmp_path):
    return write(tmp_path / "program", PACKAGE)


def test_the_gate_knows_the_tables_modules():
    assert set(FLAGGED) == {flag.module for flag in TABLE}
    assert all(flag.reason and flag.source for flag in TABLE)


def test_the_path_that_works_stays(installed, wan):
    program = FLAGS + "import flash_attn_shim; print(flags(), dict(flash_attn_shim.status().adjustments))"
    printed = installed.run(program, PYTHONPATH=wan, **ON)
    assert printed.startswith("(False, False)")
    assert "'wan.modules.attention': 'FLASH_ATTN_2_AVAILABLE is set to False: its flash_attention asserts" in printed


@pytest.mark.parametrize("variables", [{"MTLFLASHATTN_SHIM": "off"}, {}, {**ON, "MTLFLASHATTN_FLAGS": "off"}])
def test_left_alone(installed, wan, variables):
    """Switched off, on a machine that is no Mac, and on demand."""
    visible = variables.get("MTLFLASHATTN_SHIM") == "on"
    program = FLAGS + "import flash_attn_shim; print(flags(), flash_attn_shim.status().adjustments)"
    assert installed.run(program, PYTHONPATH=wan, **variables) == f"{(visible, visible)} ()"


def test_left_alone_where_flash_attn_is_real(installed, wan):
    """On a machine with CUDA its path is right; flash_attn_interface, which the shim still presents there, is not."""
    write(wan, {"flash_attn/__init__.py": ""})
    assert installed.run(FLAGS + "print(flags())", PYTHONPATH=wan, **ON) == "(True, False)"


def test_switched_off_by_the_module_itself(installed, wan):
    write(wan, {"wan/modules/attention.py": WAN + "import os; os.environ['MTLFLASHATTN_SHIM'] = 'off'\n"})
    assert installed.run(FLAGS + "print(flags())", PYTHONPATH=wan, **ON) == "(True, True)"


def test_copies_under_other_packages(installed, wan, tmp_path):
    """In another package, and as a custom node of ComfyUI, which is named after the path it was loaded from."""
    copies = {f"training/zoo/{name}": text for name, text in PACKAGE.items()}
    write(wan, {"training/__init__.py": "", "training/zoo/__init__.py": "", **copies})
    node = write(
        tmp_path / "custom_nodes" / "WanNode", {"__init__.py": "from .wan.modules import attention\n", **PACKAGE}
    )
    program = f"""
{FLAGS}
import importlib.util
name = {str(node)!r}.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, {str(node / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
print(flags("training.zoo.wan.modules.attention"), flags(module.attention.__name__))
"""
    assert installed.run(program, PYTHONPATH=wan, **ON) == "(False, False) (False, False)"


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ('assert q.device.type in ("cuda", "mps")', True),
        ("# assert q.device.type == 'cuda'", True),
        ("assert q.is_cuda", False),
    ],
)
def test_flash_attention_2_stays_where_it_works(installed, wan, line, kept):
    write(wan, {"wan/modules/attention.py": WAN.replace('assert q.device.type == "cuda"', line)})
    assert installed.run(FLAGS + "print(flags())", PYTHONPATH=wan, **ON) == f"({kept}, False)"


@pytest.mark.parametrize(
    "name",
    [
        "causvid.models.wan.wan_base.modules.attention",
        "humo.models.wan_modules.attention",
        "a.models.wan_transformer3d",
    ],
)
def test_copies_under_other_names(installed, tmp_path, name):
    *packages, module = name.split(".")
    files = {"/".join([*packages[:depth], "__init__.py"]): "" for depth in range(1, len(packages) + 1)}
    write(tmp_path, {**files, "/".join([*packages, f"{module}.py"]): WAN})
    assert installed.run(FLAGS + f"print(flags({name!r}))", PYTHONPATH=tmp_path, **ON) == "(False, False)"


@pytest.mark.parametrize(
    "text",
    [
        # StreamDiffusionV2 and others: the other way is a function of its own.
        WAN.replace("return functional.", "return _sdpa(q)\n\n    def _sdpa(q):\n        return functional."),
        # A fork in which the names differ.
        WAN.replace("flash_attention(q)", "pay_attention(q)").replace("def attention(q)", "def attend(q)"),
        "import functools\n\n"
        "def decorate(function):\n"
        "    return functools.wraps(function)(lambda *arguments: function(*arguments))\n"
        + textwrap.dedent(WAN).replace("def ", "@decorate\ndef "),
    ],
    ids=["another function", "another name", "decorated"],
)
def test_copies_of_another_shape(installed, wan, text):
    write(wan, {"wan/modules/attention.py": text})
    assert installed.run(FLAGS + "print(flags())", PYTHONPATH=wan, **ON) == "(False, False)"


def test_no_flag_without_another_path(installed, wan):
    """A file whose attention has no other way is not made worse."""
    write(wan, {"wan/modules/attention.py": WAN.replace("functional.scaled_dot_product_attention(q)", "None")})
    assert installed.run(FLAGS + "print(flags())", PYTHONPATH=wan, **ON) == "(True, False)"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "FLASH_ATTN_2_AVAILABLE does not exist; FLASH_ATTN_3_AVAILABLE does not exist"),
        (
            "FLASH_ATTN_2_AVAILABLE = 'yes'; FLASH_ATTN_3_AVAILABLE = False",
            "is str, not bool; FLASH_ATTN_3_AVAILABLE is",
        ),
    ],
)
def test_another_shape_is_left_alone_and_says_why(installed, wan, source, reason):
    write(wan, {"wan/modules/attention.py": source})
    program = """
    import wan.modules.attention as module, flash_attn_shim
    before = sorted(vars(module))
    print(dict(flash_attn_shim.status().adjustments)[module.__name__])
    """
    state = installed.run(program, PYTHONPATH=wan, **ON)
    assert state.startswith("left alone: ")
    assert reason in state


def test_undone_and_caught_up_with(installed, wan):
    program = (
        FLAGS
        + """
import os, flash_attn_shim
assert flags() == (False, False)
flash_attn_shim.uninstall()
assert flags() == (True, True)
flash_attn_shim.install()
assert flags() == (False, False)
module = sys.modules["wan.modules.attention"]
module.FLASH_ATTN_2_AVAILABLE = mine = 1
flash_attn_shim.uninstall()
assert module.FLASH_ATTN_2_AVAILABLE is mine
"""
    )
    assert installed.run(program, PYTHONPATH=wan, **ON) == ""


def test_users_flags(installed, tmp_path):
    """Added for modules that the table does not know, by the end of their names; a table's flag can be kept."""
    files = {"mine/__init__.py": "", "mine/attention.py": "HAS_FLASH = True\nlevel = 3\nfunction = len\n", **PACKAGE}
    write(tmp_path, files)
    program = (
        FLAGS
        + """
import mine.attention as m, flash_attn_shim
print(m.HAS_FLASH, m.level, m.function, *flags())
print([flag.name for flag in flash_attn_shim.status().flags if flag.listed])
"""
    )
    listed = (
        "mine.attention:HAS_FLASH=False, attention:level=2,mine.attention:function=None,"
        "modules.attention:FLASH_ATTN_3_AVAILABLE=False,wan.modules.attention:FLASH_ATTN_2_AVAILABLE=True"
    )
    printed = installed.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_FLAGS=listed, **ON).splitlines()
    assert printed[0] == "False 2 None True False"
    assert len(eval(printed[1])) == 5
    off = {"MTLFLASHATTN_SHIM": "off", "MTLFLASHATTN_FLAGS": listed}
    assert installed.run(program, PYTHONPATH=tmp_path, **off).startswith("True 3 <built-in function len> False False")


def test_the_variable_may_be_set_by_the_program(installed, tmp_path):
    write(tmp_path, {"mine.py": "HAS_FLASH = True\n"})
    program = """
    import os
    os.environ["MTLFLASHATTN_FLAGS"] = "mine:HAS_FLASH=False"
    import mine
    print(mine.HAS_FLASH)
    """
    assert installed.run(program, PYTHONPATH=tmp_path, **ON) == "False"


@pytest.mark.parametrize(
    "item", ["mine", "mine:HAS_FLASH", "mine:=False", ":HAS_FLASH=False", "mine:HAS_FLASH=maybe", "mine:HAS_FLASH=--1"]
)
def test_what_cannot_be_read_is_said_once(installed, tmp_path, item):
    write(tmp_path, {"mine.py": "HAS_FLASH = True\nOTHER = True\n"})
    listed = f"{item},mine:OTHER=False"
    program = "import mine, importlib; importlib.reload(mine); print(mine.HAS_FLASH, mine.OTHER)"
    done = installed.start("-c", program, PYTHONPATH=tmp_path, MTLFLASHATTN_FLAGS=listed, **ON)
    assert (done.returncode, done.stdout.strip()) == (0, "True False")
    assert done.stderr.count(f'MTLFLASHATTN_FLAGS: ignoring "{item}". Expected module:FLAG=value') == 1
    strict = installed.start("-W", "error", "-c", program, PYTHONPATH=tmp_path, MTLFLASHATTN_FLAGS=listed, **ON)
    assert (strict.returncode, strict.stdout.strip()) == (0, "True False")


def test_a_users_flag_named_like_a_file_of_ours(installed, tmp_path):
    write(tmp_path, {"programs.py": "flags = True\n"})
    listed = "programs:flags=False,flags:adjust=False,adjust:os=1"
    program = "import programs, flash_attn_shim.adjust; print(programs.flags)"
    assert installed.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_FLAGS=listed, **ON) == "False"


def test_with_the_real_functions(with_torch, tmp_path):
    """The whole way, with torch: an attention file that falls back, one whose FlashAttention 3 path takes [0]."""
    write(
        tmp_path,
        {
            **PACKAGE,
            "wan/modules/attention.py": """
                import torch.nn.functional as functional
                try:
                    import flash_attn_interface
                    FLASH_ATTN_3_AVAILABLE = True
                except ModuleNotFoundError:
                    FLASH_ATTN_3_AVAILABLE = False
                try:
                    import flash_attn
                    FLASH_ATTN_2_AVAILABLE = True
                except ModuleNotFoundError:
                    FLASH_ATTN_2_AVAILABLE = False

                def flash_attention(q, k, v):
                    assert q.device.type == "cuda"

                def attention(q, k, v):
                    if FLASH_ATTN_2_AVAILABLE or FLASH_ATTN_3_AVAILABLE:
                        return flash_attention(q, k, v)
                    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
                """,
            "opensora/models/mmdit/math.py": """
                from flash_attn import flash_attn_func as version_2
                try:
                    from flash_attn_interface import flash_attn_func as version_3
                    SUPPORT_FA3 = True
                except ImportError:
                    SUPPORT_FA3 = False

                def attention(q, k, v):
                    return version_3(q, k, v)[0] if SUPPORT_FA3 else version_2(q, k, v)
                """,
        },
    )
    program = """
    import torch, wan.modules.attention, opensora.models.mmdit.math
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind()
    expected = torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5).softmax(-1), v)
    for attention in (wan.modules.attention.attention, opensora.models.mmdit.math.attention):
        assert torch.allclose(attention(q, k, v), expected, atol=1e-5), attention
    """
    assert with_torch.run(program, PYTHONPATH=tmp_path, **ON) == ""
    opposite = {"MTLFLASHATTN_FLAGS": "off", **ON}
    assert (
        with_torch.start(
            "-c",
            "import wan.modules.attention as w; w.attention(*__import__('torch').ones(3, 1, 1, 1, 8))",
            PYTHONPATH=tmp_path,
            **opposite,
        ).returncode
        == 1
    )


def test_doctor_lists_them(installed):
    """The table, what the user adds, and why nothing is set where nothing is."""

    def programs(**variables):
        done = installed.start("-m", "flash_attn_shim", "doctor", "--json", **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["programs"]

    found = programs(MTLFLASHATTN_FLAGS="mine:HAS_FLASH=False", **ON)
    assert found["mine"] == ["HAS_FLASH = False: MTLFLASHATTN_FLAGS asks for it"]
    assert found["wan.modules.attention"][0].startswith(
        "FLASH_ATTN_2_AVAILABLE = False: its flash_attention asserts CUDA"
    )
    assert set(FLAGGED) < set(found)
    assert programs(MTLFLASHATTN_SHIM="off") == {"left alone": "MTLFLASHATTN_SHIM=off switches it off"}
    assert programs(MTLFLASHATTN_FLAGS="off", **ON) == {"left alone": "MTLFLASHATTN_FLAGS=off leaves programs alone"}
