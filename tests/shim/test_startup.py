"""What the hook does to an interpreter that has nothing to do with attention, and where it does not run."""

import sys

import pytest

from .environments import ROOT, make_venv

FOUND = "import importlib.util as u; print(u.find_spec('flash_attn') is not None)"


def imported(interpreter, *options):
    lines = interpreter.start("-X", "importtime", *options, "-c", "pass").stderr.splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def test_startup_imports_nothing_else(installed, tmp_path):
    """Not one module of the standard library, and of ours the package and the gate."""
    bare = make_venv(tmp_path)
    (bare.site_packages / "other.pth").write_text("# Python 3.13 imports a codec as soon as there is any .pth file.\n")
    assert imported(installed) - imported(bare) == {"flash_attn_shim", "flash_attn_shim.autoload"}


def test_an_unrelated_import_does_not_wake_the_shim(installed):
    woken = installed.run(
        """
        import sys, json, email.message, importlib.metadata
        importlib.metadata.PackageNotFoundError
        try:
            importlib.metadata.version("no-such-thing")
        except importlib.metadata.PackageNotFoundError:
            pass
        print(sorted(name for name in sys.modules if name.startswith("flash_attn")))
        """,
        MTLFLASHATTN_SHIM="on",
    )
    assert woken == "['flash_attn_shim', 'flash_attn_shim.autoload']"


@pytest.mark.parametrize("option", ["-I", "-E", "-s", "-B"])
def test_active_under(installed, option):
    if option in ("-I", "-E"):  # os.environ is there all the same
        assert installed.run(FOUND, option, MTLFLASHATTN_SHIM="off") == "False"
    assert installed.run(FOUND, option, MTLFLASHATTN_SHIM="on") == "True"


def test_without_site_install_does_it(installed):
    program = f"""
    import sys
    sys.path.append({str(installed.site_packages)!r})
    assert not any("flash_attn_shim" in type(finder).__module__ for finder in sys.meta_path)
    try:
        import flash_attn
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError
    import flash_attn_shim
    flash_attn_shim.install()
    flash_attn_shim.install()
    import flash_attn
    print(flash_attn.__version__, sum("flash_attn_shim" in type(finder).__module__ for finder in sys.meta_path))
    """
    assert installed.run(program, "-S", MTLFLASHATTN_SHIM="on") == "2.8.3 1"


def test_on_pythonpath_install_does_it(tmp_path):
    """As after `pip install --target`: a directory on PYTHONPATH, whose .pth files do not run."""
    interpreter = make_venv(tmp_path)
    assert interpreter.run(FOUND, PYTHONPATH=ROOT, MTLFLASHATTN_SHIM="on") == "False"
    program = "import flash_attn_shim; flash_attn_shim.install();" + FOUND
    assert interpreter.run(program, PYTHONPATH=ROOT, MTLFLASHATTN_SHIM="on") == "True"


@pytest.mark.skipif(sys.platform == "darwin", reason="seen by default on a Mac")
def test_the_switch_counts_when_the_name_is_looked_up(installed):
    program = """
    import os, importlib.util
    seen = []
    for value in ("off", "on", "0", "ON", "false", "on", "auto"):
        os.environ["MTLFLASHATTN_SHIM"] = value
        seen.append(importlib.util.find_spec("flash_attn") is not None)
    print(seen)
    """
    assert installed.run(program) == str([False, True, False, True, False, True, False])


def test_uninstall_leaves_nothing(installed):
    program = """
    import sys, flash_attn, flash_attn_shim
    flash_attn_shim.uninstall()
    assert not any("flash_attn_shim" in type(finder).__module__ for finder in sys.meta_path)
    assert not any(name.split(".")[0] in ("flash_attn", "flash_attn_interface") for name in sys.modules)
    try:
        import flash_attn
    except ModuleNotFoundError as error:
        print(error)
    flash_attn_shim.uninstall()
    flash_attn_shim.install()
    import flash_attn
    """
    assert installed.run(program, MTLFLASHATTN_SHIM="on") == "No module named 'flash_attn'"


def test_uninstalled_under_a_running_interpreter(tmp_path, wheel):
    """pip that uninstalls the project that it runs next to."""
    interpreter = make_venv(tmp_path, wheel)
    program = """
    import shutil, sys, flash_attn_shim, importlib.metadata
    shutil.rmtree(flash_attn_shim.__path__[0])
    sys.path_importer_cache.clear()
    list(importlib.metadata.distributions())
    try:
        import flash_attn
    except ModuleNotFoundError as error:
        print(error)
    """
    assert interpreter.run(program, MTLFLASHATTN_SHIM="on") == "No module named 'flash_attn'"


def test_startup_costs_less_than_a_millisecond():
    """By the fastest start of each, which a loaded machine disturbs least; `bench/startup.py` takes the medians."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import startup
    finally:
        sys.path.pop(0)
    costs = []
    for _ in range(3):  # whatever else the machine does in the meantime
        without, with_hook = startup.measure(rounds=40)
        costs.append(min(with_hook) - min(without))
        if costs[-1] < 1.0:
            return
    raise AssertionError(f"{costs} ms")


def test_looking_up_another_name_costs_next_to_nothing(installed):
    """Half a microsecond, by the fastest of many; importlib's own work for a finder takes longer."""
    program = """
    import timeit
    from flash_attn_shim.autoload import gate
    find = gate.find_spec
    cost = min(timeit.repeat(lambda: find("package.module", None, None), number=2000, repeat=30)) / 2000
    assert cost < 0.5e-6, cost
    """
    assert installed.run(program, MTLFLASHATTN_SHIM="on") == ""
