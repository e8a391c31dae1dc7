"""Programs of users: the Wan family, flags that a user lists, packages that do not see us; what doctor says."""

import json

import pytest

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


def test_the_path_that_works_stays(installed, wan):
    program = FLAGS + "import flash_attn_shim; print(flags(), flash_attn_shim.status().decisions[0])"
    printed = installed.run(program, PYTHONPATH=wan, **ON)
    assert printed.startswith(
        "(False, False) Decision(who='wan.modules.attention', what='does not see flash_attn: line 7 "
    )


@pytest.mark.parametrize("variables", [{"MTLFLASHATTN_SHIM": "off"}, {}, {**ON, "MTLFLASHATTN_FLAGS": "off"}])
def test_left_alone(installed, wan, variables):
    """Switched off, on a machine that is no Mac, and on demand."""
    visible = variables.get("MTLFLASHATTN_SHIM") == "on"
    program = FLAGS + "import flash_attn_shim; print(flags(), flash_attn_shim.status().decisions)"
    assert installed.run(program, PYTHONPATH=wan, **variables) == f"{(visible, visible)} ()"


def test_left_alone_where_flash_attn_is_real(installed, wan):
    """On a machine with CUDA its path is right; flash_attn_interface, which the shim still presents there, is not."""
    write(wan, {"flash_attn/__init__.py": ""})
    assert installed.run(FLAGS + "print(flags())", PYTHONPATH=wan, **ON) == "(True, False)"


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
def test_flash_attention_stays_where_it_works(installed, wan, line, kept):
    write(wan, {"wan/modules/attention.py": WAN.replace('assert q.device.type == "cuda"', line)})
    assert installed.run(FLAGS + "print(flags())", PYTHONPATH=wan, **ON) == str((kept, kept))


def test_users_flags(installed, tmp_path):
    """For modules by the end of their names; of any simple type, that of the program's flag."""
    values = "HAS_FLASH = True\nlevel = 3\nfunction = len\nBACKEND = 'FA3'\nMODE = 'x'\nEMPTY = None\n"
    write(tmp_path, {"mine/__init__.py": "", "mine/attention.py": values})
    program = """
import mine.attention as m, flash_attn_shim
print(m.HAS_FLASH, m.level, m.function, m.BACKEND, m.MODE, m.EMPTY)
print(len(flash_attn_shim.status().flags), flash_attn_shim.status().adjustments)
"""
    listed = (
        "mine.attention:HAS_FLASH=False, attention:level=2,mine.attention:function=None,"
        "attention:BACKEND=FA2,attention:MODE='True',attention:EMPTY=x-y"
    )
    printed = installed.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_FLAGS=listed, **ON).splitlines()
    assert printed[0] == "False 2 None FA2 True x-y"
    assert printed[1].startswith(
        "6 (('mine.attention', \"HAS_FLASH is set to False: MTLFLASHATTN_FLAGS asks for it; level"
    )
    off = {"MTLFLASHATTN_SHIM": "off", "MTLFLASHATTN_FLAGS": listed}
    assert installed.run(program, PYTHONPATH=tmp_path, **off).startswith("True 3 <built-in function len> FA3 x None")


def test_flags_are_undone_and_caught_up_with(installed, tmp_path):
    write(tmp_path, {"mine.py": "HAS_FLASH = True\n"})
    program = """
import mine, flash_attn_shim
assert not mine.HAS_FLASH
flash_attn_shim.uninstall()
assert mine.HAS_FLASH
flash_attn_shim.install()
assert not mine.HAS_FLASH
mine.HAS_FLASH = other = 1
flash_attn_shim.uninstall()
assert mine.HAS_FLASH is other
"""
    assert installed.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_FLAGS="mine:HAS_FLASH=False", **ON) == ""


def test_packages_that_do_not_see_us(installed, tmp_path):
    """MTLFLASHATTN_HIDE: by their names, whatever their code does, and also if others have imported flash_attn."""
    probe = """
        import importlib.util, importlib.metadata
        SPEC = importlib.util.find_spec("flash_attn") is not None
        try:
            from flash_attn import __version__
            IMPORTED = True
        except ModuleNotFoundError:
            IMPORTED = False
        try:
            VERSION = importlib.metadata.version("flash_attn")
        except importlib.metadata.PackageNotFoundError:
            VERSION = None
        """
    write(tmp_path, {"one/__init__.py": "", "one/part.py": probe, "two.py": probe, "onemore.py": probe})
    program = "import {}importlib\nfor name in ('one.part', 'two', 'onemore'):\n    m = importlib.import_module(name)\n"
    program += "    print(m.SPEC, m.IMPORTED, m.VERSION)"
    for before in ("", "flash_attn, "):
        hide = {"MTLFLASHATTN_HIDE": "one, two", **ON}
        printed = installed.run(program.format(before), PYTHONPATH=tmp_path, **hide).splitlines()
        assert printed == ["False False None", "False False None", "True True 2.8.3"]


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
    "item", ["mine", "mine:HAS_FLASH", "mine:=False", ":HAS_FLASH=False", "mine:HAS_FLASH=", "mine:HAS-FLASH=--1"]
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


def test_a_value_of_another_type_is_said_once(installed, tmp_path):
    write(tmp_path, {"mine.py": "HAS_FLASH = True\n"})
    program = "import mine, importlib; importlib.reload(mine); print(mine.HAS_FLASH)"
    done = installed.start("-c", program, PYTHONPATH=tmp_path, MTLFLASHATTN_FLAGS="mine:HAS_FLASH=perhaps", **ON)
    assert done.stdout.strip() == "True"
    assert done.stderr.count("HAS_FLASH of mine is bool, not str: it is not set to 'perhaps'") == 1


def test_a_users_flag_named_like_a_file_of_ours(installed, tmp_path):
    write(tmp_path, {"programs.py": "flags = True\n"})
    listed = "programs:flags=False,flags:adjust=False,adjust:os=1"
    program = "import programs, flash_attn_shim.adjust; print(programs.flags)"
    assert installed.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_FLAGS=listed, **ON) == "False"


def test_doctor_says_what_a_program_decides(with_torch, tmp_path):
    """What the user lists, what the code of files shows, and why nothing is done where nothing is."""

    def programs(*arguments, **variables):
        done = with_torch.start(
            "-m", "flash_attn_shim", "doctor", "--json", *arguments, PYTHONPATH=tmp_path, **variables
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["programs"]

    early = "from flash_attn_interface import flash_attn_func\ndef attend(q):\n    return flash_attn_func(q, q, q)[0]\n"
    old = "from flash_attn.flash_attn_interface import flash_attn_unpadded_func\n"
    write(tmp_path, {**PACKAGE, "wan/early.py": early, "wan/old.py": old, "wan/plain.py": "import flash_attn\n"})
    found = programs(tmp_path / "wan", "wan.early", "json", MTLFLASHATTN_FLAGS="mine:HAS_FLASH=False", **ON)
    assert found["mine"] == ["HAS_FLASH = False: MTLFLASHATTN_FLAGS asks for it"]
    (insists,) = found[str(tmp_path / "wan/modules/attention.py")]
    assert insists.startswith("does not see flash_attn and flash_attn_interface: line 7 asks for CUDA before it calls")
    (indexes,) = found[str(tmp_path / "wan/early.py")]
    assert indexes.startswith("line 3: flash_attn_func returns (out, softmax_lse): the program indexes")
    assert found[str(tmp_path / "wan/old.py")][0].startswith("line 1: flash_attn_unpadded_func is there")
    assert found[str(tmp_path / "wan/plain.py")][0].startswith("nothing: ")
    assert found["json"] == ["no file there mentions flash_attn"]
    assert programs(MTLFLASHATTN_SHIM="off") == {"left alone": "MTLFLASHATTN_SHIM=off switches it off"}
    assert programs(MTLFLASHATTN_FLAGS="off", **ON) == {"left alone": "MTLFLASHATTN_FLAGS=off leaves programs alone"}
