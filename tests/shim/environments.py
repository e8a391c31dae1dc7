"""Environments to look `flash_attn` up in: throw-away venvs with the built wheel, and interpreters started in them."""

import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Put in front of a program: the rest of it runs as if on an Apple-silicon Mac.
MAC = """
import os, flash_attn_shim.finder, flash_attn_shim.policy
flash_attn_shim.finder.environment = lambda: flash_attn_shim.policy.Environment(
    os.environ, "darwin", "arm64", flash_attn_shim.finder.is_installed)
"""


class Interpreter:
    """A Python of an environment, started with a clean environment of variables."""

    def __init__(self, prefix):
        self.executable = Path(prefix, "bin", "python")
        self.site_packages = next(Path(prefix, "lib").glob("python*")) / "site-packages"

    def start(self, *arguments, **variables):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MTLFLASHATTN"))}
        environment = {**kept, "PYTHONDONTWRITEBYTECODE": "1", **{k: str(v) for k, v in variables.items()}}
        return subprocess.run(
            [self.executable, *arguments],
            env=environment,
            cwd=self.site_packages.parent,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, program, *options, **variables):
        """Run a program (dedented source) that must end well without a word on stderr; return what it printed."""
        done = self.start(*options, "-c", textwrap.dedent(program), **variables)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.strip()


def make_venv(prefix, wheel=None, outer=False):
    """A venv without pip. `wheel` is unpacked into it; `outer` shows it the packages that the tests run with."""
    venv.create(prefix, symlinks=True)
    interpreter = Interpreter(prefix)
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(interpreter.site_packages)
    if outer:
        packages = [path for path in sys.path if Path(path).name == "site-packages"]
        (interpreter.site_packages / "outer.pth").write_text("".join(f"{path}\n" for path in packages))
    return interpreter


def build(kind, directory, source=ROOT):
    """Build a "wheel" or an "sdist" of a source tree with hatchling; return its path."""
    program = f"import hatchling.build as b; print(b.build_{kind}({str(directory)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(directory, done.stdout.split()[-1])


def write(directory, files):
    """Write a tree of files, path -> text."""
    for name, text in files.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return directory
