"""`import flash_attn` and its relatives: what is found, what is not, and with which errors."""

import sys

import pytest

from .environments import MAC, write

ON = {"MTLFLASHATTN_SHIM": "on"}

REAL = {"flash_attn/__init__.py": "__version__ = 'real'\n", "flash_attn/bert_padding.py": ""}


def test_specs_are_real(installed):
    program = """
    import importlib.machinery as m, importlib.util as u, os, sys
    package, module = u.find_spec("flash_attn"), u.find_spec("flash_attn_interface")
    for spec in (package, module):
        assert type(spec) is m.ModuleSpec
        assert type(spec.loader) is m.SourceFileLoader
        assert os.path.isfile(spec.origin) and spec.has_location
        assert spec.loader.get_source(spec.name).startswith('\"\"\"')
    (directory,) = package.submodule_search_locations
    assert os.path.isfile(os.path.join(directory, "flash_attn_interface.py"))
    assert module.submodule_search_locations is None
    import flash_attn
    assert flash_attn.__spec__.origin == flash_attn.__file__ == package.origin
    assert list(flash_attn.__path__) == [directory]
    assert flash_attn.__version__ == "2.8.3"
    assert "torch" not in sys.modules
    """
    assert installed.run(program, **ON) == ""


def test_looking_up_and_importing_the_package_imports_no_torch(with_torch):
    program = """
    import sys, importlib.util, flash_attn_shim
    importlib.util.find_spec("flash_attn.flash_attn_interface")
    importlib.util.find_spec("flash_attn_interface")
    flash_attn_shim.status()
    import flash_attn
    dir(flash_attn)
    assert "torch" not in sys.modules
    flash_attn.flash_attn_func
    assert "torch" in sys.modules
    """
    assert with_torch.run(program, **ON) == ""


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("import flash_attn.does_not_exist", "ModuleNotFoundError: No module named 'flash_attn.does_not_exist'"),
        ("import flash_attn.cute", "ModuleNotFoundError: No module named 'flash_attn.cute'"),
        ("from flash_attn import nope", "ImportError: cannot import name 'nope' from 'flash_attn'"),
        ("from flash_attn import flash_attn_unpadded_func", "ImportError: cannot import name"),
        ("import flash_attn; flash_attn.nope", "AttributeError: module 'flash_attn' has no attribute 'nope'"),
        ("import flash_attn_2_cuda", "ModuleNotFoundError: No module named 'flash_attn_2_cuda'"),
        ("import flash_attn_3", "ModuleNotFoundError: No module named 'flash_attn_3'"),
        ("import flash_attn_cuda", "ModuleNotFoundError: No module named 'flash_attn_cuda'"),
        ("import flash_attn_interface.x", "ModuleNotFoundError: No module named 'flash_attn_interface.x'"),
    ],
)
def test_what_does_not_exist_raises(with_torch, statement, error):
    done = with_torch.start("-c", statement, **ON)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(error)


def test_functions_are_those_of_flash_attn_mps(with_torch):
    program = """
    import inspect, pickle
    import flash_attn, flash_attn_interface, flash_attn_mps.frontends.fa2 as two, flash_attn_mps.frontends.fa3 as three
    assert flash_attn.flash_attn_interface.__name__ == "flash_attn.flash_attn_interface"
    assert len(flash_attn.__all__) == 7 and set(flash_attn.__all__) <= set(dir(flash_attn))
    for name in flash_attn.__all__:
        function = getattr(flash_attn, name)
        assert function is getattr(flash_attn.flash_attn_interface, name)
        assert function.__code__ is getattr(two, name).__code__
        assert function.__module__ == "flash_attn.flash_attn_interface"
        assert getattr(two, name).__module__.startswith(two.__name__)  # fa2, fa2_packed, fa2_kvcache
        assert b"_mps" not in pickle.dumps(function) and pickle.loads(pickle.dumps(function)) is function
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    for name in flash_attn_interface.__all__:
        function = getattr(flash_attn_interface, name)
        assert inspect.unwrap(function).__code__ is getattr(three, name).__code__
        assert function.__module__ == "flash_attn_interface"
        assert b"_mps" not in pickle.dumps(function) and pickle.loads(pickle.dumps(function)) is function
    namespace = {}
    exec("from flash_attn import *", namespace)
    assert set(flash_attn.__all__) <= set(namespace)
    """
    assert with_torch.run(program, **ON) == ""


def test_every_presented_module_is_found_by_walking_and_imports(with_torch):
    program = """
    import importlib, pkgutil, flash_attn
    names = [m.name for m in pkgutil.walk_packages(flash_attn.__path__, "flash_attn.")]
    for name in names:
        module = importlib.import_module(name)
        assert module.__spec__.name == name and module.__file__
        assert all(getattr(module, x) is not None for x in dir(module) if not x.startswith("__"))
    print(*names)
    """
    assert "flash_attn.flash_attn_interface" in with_torch.run(program, **ON).split()


def test_auto_off_a_mac_finds_nothing(with_torch):
    if sys.platform == "darwin":
        pytest.skip("not off a Mac")
    program = """
    import importlib.util as u, importlib.metadata as m, sys
    assert u.find_spec("flash_attn") is None and u.find_spec("flash_attn_interface") is None
    assert "flash_attn" not in m.packages_distributions()
    assert "torch" not in sys.modules
    import flash_attn
    """
    done = with_torch.start("-c", program.replace("\n    ", "\n"))
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'flash_attn'"


def test_auto_on_a_mac_needs_torch(installed, fake_torch):
    program = MAC + "import importlib.util as u; print(u.find_spec('flash_attn') is not None)"
    assert installed.run(program) == "False"
    assert installed.run(program, PYTHONPATH=fake_torch) == "True"
    assert installed.run(program, PYTHONPATH=fake_torch, MTLFLASHATTN_SHIM="OFF") == "False"
    assert installed.run("import sys; sys.modules['torch'] = None\n" + program, PYTHONPATH=fake_torch) == "False"


def test_a_leftover_directory_of_torch_is_no_torch(installed, tmp_path):
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    program = MAC + "import importlib.util as u; print(u.find_spec('flash_attn') is not None)"
    assert installed.run(program, PYTHONPATH=tmp_path) == "False"


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_broken_torch_breaks_functions_alone(installed, broken_torch, mode):
    """A program that guards its import goes on; the error carries torch's own."""
    program = (
        MAC
        + """
from pathlib import Path
import flash_attn
assert flash_attn.__version__ == "2.8.3"
(package,) = map(Path, flash_attn.__path__)
files = [path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py") if path.stat().st_size]
modules = [".".join(path.parts) for path in files if path.name != "__init__"]
assert "flash_attn.flash_attn_interface" in modules
for statement in (
    "flash_attn.flash_attn_func",
    "from flash_attn import flash_attn_varlen_func",
    "import flash_attn_interface",
    *(f"import {name}" for name in modules),
):
    try:
        exec(statement)
    except ImportError as error:
        assert "OSError" in str(error) and "libtorch_cpu" in str(error), error
        assert isinstance(error.__cause__, OSError), (statement, error.__cause__)
    else:
        raise AssertionError(statement)
"""
    )
    assert installed.run(program, PYTHONPATH=broken_torch, MTLFLASHATTN_SHIM=mode) == ""


def test_modules_limits_what_is_seen(installed):
    program = """
    import importlib.util as u
    print([u.find_spec(name) is not None for name in ("flash_attn", "flash_attn_interface")])
    """
    assert installed.run(program, MTLFLASHATTN_SHIM_MODULES="flash_attn", **ON) == "[True, False]"
    assert installed.run(program, MTLFLASHATTN_SHIM_MODULES="flash_attn_interface", **ON) == "[False, True]"
    assert installed.run(program, **ON) == "[True, True]"


def test_an_unknown_switch_warns_once_and_counts_as_auto(installed, fake_torch):
    program = MAC + "import importlib.util as u; print([u.find_spec('flash_attn') is not None for _ in range(3)])"
    for options in ((), ("-W", "always"), ("-W", "error")):
        done = installed.start(*options, "-c", program, PYTHONPATH=fake_torch, MTLFLASHATTN_SHIM="enabled")
        assert done.stdout.strip() == "[True, True, True]"
        assert done.stderr.count("MTLFLASHATTN_SHIM=enabled") == 1


def test_a_real_package_wins(installed, tmp_path):
    write(tmp_path, REAL)
    program = """
    import flash_attn, importlib.util as u, flash_attn_shim
    assert flash_attn.__version__ == "real" and u.find_spec("flash_attn.flash_attn_interface") is None
    print([name.why for name in flash_attn_shim.status().names])
    """
    assert "another module of that name is already imported" in installed.run(program, PYTHONPATH=tmp_path, **ON)


@pytest.mark.parametrize("real", ["flash_attn", "flash_attn_interface"])
def test_a_real_package_wins_for_its_name_alone(installed, tmp_path, real):
    write(tmp_path, {f"{real}.py": "__version__ = 'real'\n"})
    program = """
    import importlib.util as u, flash_attn_shim
    print([name for name in ("flash_attn", "flash_attn_interface") if "presents" in u.find_spec(name).origin])
    print([name.name for name in flash_attn_shim.status().names if name.visible])
    """
    other = str([{"flash_attn": "flash_attn_interface", "flash_attn_interface": "flash_attn"}[real]])
    assert installed.run(program, PYTHONPATH=tmp_path, **ON).split("\n") == [other, other]


def test_a_real_package_behind_a_finder_wins(installed):
    """An editable install of setuptools: a finder at the end of sys.meta_path, and no directory on sys.path."""
    program = """
    import sys, importlib.machinery as m, importlib.util as u
    class Editable:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "flash_attn":
                return u.spec_from_loader(name, m.BuiltinImporter, origin="editable")
    sys.meta_path.append(Editable)
    print(u.find_spec("flash_attn").origin)
    """
    assert installed.run(program, **ON) == "editable"


@pytest.mark.parametrize(
    ("leftover", "wins"),
    [
        ({}, "shim"),
        ({"__pycache__/__init__.cpython-311.pyc": ""}, "shim"),
        ({"layers/__pycache__/rotary.cpython-311.pyc": "", "notes.txt": ""}, "shim"),
        # FlashAttention 4 installs flash_attn/cute and no flash_attn/__init__.py, which is an installation.
        ({"cute/__init__.py": ""}, "real"),
        ({"flash_attn_interface.py": ""}, "real"),
    ],
)
def test_a_leftover_directory_is_no_installation(installed, tmp_path, leftover, wins):
    (tmp_path / "flash_attn").mkdir()
    write(tmp_path / "flash_attn", leftover)
    program = """
    import flash_attn
    print("shim" if getattr(flash_attn, "__version__", None) == "2.8.3" else "real")
    """
    assert installed.run(program, PYTHONPATH=tmp_path, **ON) == wins


def test_a_leftover_directory_stays_one_when_the_shim_is_off(installed, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    program = "import importlib.util as u; print(u.find_spec('flash_attn').origin)"
    assert installed.run(program, PYTHONPATH=tmp_path, MTLFLASHATTN_SHIM="off") == "None"


def test_a_blocked_import_stays_blocked(installed):
    program = """
    import sys, importlib.util as u, importlib.metadata as m, flash_attn_shim
    sys.modules["flash_attn"] = None
    assert u.find_spec("flash_attn") is None
    assert not list(m.distributions(name="flash_attn"))
    print(flash_attn_shim.status().names[0].why)
    try:
        import flash_attn
    except ModuleNotFoundError as error:
        print(error)
    """
    blocked, error = installed.run(program, **ON).split("\n")
    assert blocked == 'sys.modules["flash_attn"] is None: something blocks the import'
    assert error == "import of flash_attn halted; None in sys.modules"


def test_somebody_elses_stub_is_left_alone(installed):
    program = """
    import sys, types, importlib.metadata as m
    stub = sys.modules["flash_attn"] = types.ModuleType("flash_attn")
    import flash_attn, flash_attn_shim
    assert flash_attn is stub and not list(m.distributions(name="flash_attn"))
    flash_attn_shim.uninstall()
    assert sys.modules["flash_attn"] is stub
    """
    assert installed.run(program, **ON) == ""


def test_a_finder_without_find_spec(installed):
    """googlecolab/colabtools#5000"""
    program = """
    import sys
    class Old:
        def find_module(self, name, path=None): return None
    sys.meta_path[:] = [Old(), *sys.meta_path, Old()]
    finder = sys.meta_path[1]
    assert finder.find_spec("flash_attn") and finder.find_spec("flash_attn_interface")
    import flash_attn_shim
    assert flash_attn_shim.status().names[0].visible
    """
    assert installed.run(program, **ON) == ""


@pytest.mark.parametrize("position", ["first", "last"])
def test_a_finder_that_looks_names_up_itself(installed, position):
    """As tracers do (DataDog/dd-trace-py#17742): it must not find us while we ask it."""
    program = f"""
    import sys, importlib.util as u
    class Tracer:
        busy = set()
        def find_spec(self, name, path=None, target=None):
            if name not in self.busy:
                self.busy.add(name)
                try:
                    return u.find_spec(name)
                finally:
                    self.busy.discard(name)
    sys.meta_path.insert({0 if position == "first" else 99}, Tracer())
    import flash_attn_shim
    assert flash_attn_shim.status().names[0].visible
    import flash_attn
    assert flash_attn.__version__ == "2.8.3" and flash_attn_shim.status().names[1].visible
    """
    assert installed.run(program, **ON) == ""


def test_a_namespace_with_a_loader_is_one_still(installed, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    program = """
    import sys, importlib._bootstrap_external as e, importlib.machinery as m
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            spec = m.PathFinder.find_spec(name)
            if name == "flash_attn":
                loader = getattr(e, "NamespaceLoader", None) or e._NamespaceLoader
                spec.loader = loader(name, spec.submodule_search_locations, None)
            return spec
    sys.meta_path.append(Finder)
    import flash_attn
    print(flash_attn.__version__)
    """
    assert installed.run(program, PYTHONPATH=tmp_path, **ON) == "2.8.3"


def test_eight_threads_import_at_once(with_torch):
    program = """
    import sys, threading, importlib
    sys.setswitchinterval(1e-6)
    names = ["flash_attn", "flash_attn_interface", "flash_attn.flash_attn_interface", "importlib.metadata"] * 2
    barrier, seen = threading.Barrier(len(names)), []
    def work(name):
        barrier.wait()
        module = importlib.import_module(name)
        seen.append(getattr(module, "flash_attn_func", None) or module.version("flash-attn"))
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    print(len(seen), sum(item == "2.8.3" for item in seen))
    """
    assert with_torch.run(program, **ON) == "8 2"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(with_torch, tmp_path, method):
    """Functions travel by pickle, and a spawned child runs the hook itself."""
    program = f"""
    import multiprocessing, flash_attn
    def look(function, queue):
        import flash_attn
        queue.put((function is flash_attn.flash_attn_func, flash_attn.__file__))
    if __name__ == "__main__":
        context = multiprocessing.get_context({method!r})
        queue = context.Queue()
        child = context.Process(target=look, args=(flash_attn.flash_attn_func, queue))
        child.start()
        assert queue.get(timeout=120) == (True, flash_attn.__file__)
        child.join()
    """
    script = write(tmp_path, {"script.py": program}) / "script.py"
    done = with_torch.start("-W", "ignore", script, **ON)
    assert (done.returncode, done.stderr) == (0, "")


def test_status_in_words(installed, tmp_path):
    program = """
    import flash_attn_shim
    s = flash_attn_shim.status()
    print(s.installed, s.mode, s.names[0].visible, s.names[0].why, s.metadata, s.transformers, sep="|")
    """
    assert installed.run(program, **ON) == "True|on|True|presented by the shim|None|None"
    off = "MTLFLASHATTN_SHIM=Off switches it off"
    assert installed.run(program, MTLFLASHATTN_SHIM="Off") == f"True|off|False|{off}|{off}|{off}"
    real = "a real installation has it"
    write(tmp_path, REAL)
    assert installed.run(program, PYTHONPATH=tmp_path, **ON) == f"True|on|False|{real}|{real}|{real}"
