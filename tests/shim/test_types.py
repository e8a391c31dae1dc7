"""What a type checker sees of `flash_attn` where mtlflashattn is installed: the stub-only packages of the wheel."""

import ast
import json
import re
import runpy
import subprocess
import sys

import pytest

from .environments import ROOT, make_venv, write

STUBS = ROOT / "stubs"

# Enough of torch for a signature: the real one takes mypy ten seconds. `.ci/run` has mypy read everything with it.
TORCH = {
    "torch/py.typed": "",
    "torch/__init__.pyi": """
        from collections.abc import Iterator

        class Tensor:
            def __iter__(self) -> Iterator[Tensor]: ...

        class dtype: ...
    """,
    "torch/nn.pyi": "class Module: ...\n",
}

RIGHT = """
import flash_attn
import flash_attn_interface
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_qkvpacked_func
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.modules.mha import MHA
from flash_attn.ops.triton.layer_norm import RMSNorm, rms_norm_fn
from torch import Tensor

def attend(q: Tensor, lengths: Tensor, probs: bool) -> None:
    reveal_type(flash_attn_func(q, q, q, causal=True))
    reveal_type(flash_attn_func(q, q, q, 0.1, None, True, (3, 0), return_attn_probs=True))
    reveal_type(flash_attn_func(q, q, q, return_attn_probs=probs))
    reveal_type(flash_attn_varlen_func(q, q, q, lengths, lengths, 5, 5))
    reveal_type(flash_attn.flash_attn_interface.flash_attn_qkvpacked_func(q, causal=True))
    reveal_type(flash_attn_interface.flash_attn_func(q, q, q))
    reveal_type(flash_attn.__version__)
    out, softmax_lse = flash_attn_with_kvcache(q, q, q, cache_seqlens=lengths, return_softmax_lse=True)
"""
REVEALED = [
    "torch.Tensor",
    "tuple[torch.Tensor, torch.Tensor, torch.Tensor]",
    "torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]",
    "torch.Tensor",
    "torch.Tensor | Any",
    "torch.Tensor | Any",
    "str",
]

WRONG = """
from torch import Tensor

import flash_attn_interface
from flash_attn import flash_attn_func, flash_attn_kvpacked_func

def attend(q: Tensor) -> None:
    flash_attn_func(q, q)
    flash_attn_func(q, q, q, window_size=3)
    flash_attn_func(q, q, q, is_causal=True)
    flash_attn_kvpacked_func(q)
    flash_attn_interface.flash_attn_func(q, q, q, dropout_p=0.1)
    out, softmax_lse = flash_attn_func(q, q, q, return_attn_probs=True)
    from flash_attn import flash_attn_something
    import flash_attn.ops.nothing
"""


@pytest.fixture(scope="module")
def said(wheel, tmp_path_factory):
    """What mypy says of both programs, `{file: [(line, message)]}`."""
    interpreter = make_venv(tmp_path_factory.mktemp("typed"), wheel)
    write(interpreter.site_packages, TORCH)
    programs = write(tmp_path_factory.mktemp("programs"), {"right.py": RIGHT, "wrong.py": WRONG})
    options = ("--strict", "--output=json", f"--cache-dir={programs / 'cache'}", "--config-file=")
    command = [sys.executable, "-m", "mypy", *options, "--python-executable", interpreter.executable]
    done = subprocess.run([*command, "right.py", "wrong.py"], cwd=programs, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {"right.py": [], "wrong.py": []}
    for line in done.stdout.splitlines():
        message = json.loads(line)
        found[message["file"]].append((message["line"], message["message"]))
    return found


def test_a_right_program_passes_and_has_the_types(said):
    revealed = [re.fullmatch(r'Revealed type is "(.*)"', message) for _, message in said["right.py"]]
    assert all(revealed), [m for m, match in zip(said["right.py"], revealed, strict=True) if not match]
    assert [match[1] for match in revealed] == REVEALED


def test_each_wrong_line_is_told(said):
    lines = WRONG.splitlines()
    begin = lines.index("def attend(q: Tensor) -> None:") + 1
    assert {line for line, _ in said["wrong.py"]} == set(range(begin + 1, len(lines) + 1))


def test_the_stubs_are_what_the_script_writes():
    held = {
        path.relative_to(STUBS).as_posix(): path.read_text() for path in STUBS.glob("*-stubs/**/*") if path.is_file()
    }
    assert runpy.run_path(str(STUBS / "make.py"))["files"]() == held, "python stubs/make.py writes them anew"


def test_the_stubs_name_what_the_modules_have(with_torch):
    """Each name of a stub is there, and no public one is missing that the module defines."""
    program = """
    import importlib, pathlib, re, flash_attn
    root = pathlib.Path(flash_attn.__file__, "../../../..").resolve()
    missing, unnamed, names = [], [], 0
    for stub in root.glob("*-stubs/**/*.pyi"):
        parts = stub.relative_to(root).with_suffix("").as_posix().replace("-stubs", "").split("/")
        module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        named = set(re.findall(r" as (\\w+)$", stub.read_text(), re.MULTILINE))
        names += len(named)
        missing += [(module.__name__, name) for name in named if not hasattr(module, name)]
        unnamed += [
            (module.__name__, name)
            for name in {*dir(module), *getattr(module, "__all__", ())} - named
            if name[0] != "_" and getattr(getattr(module, name), "__module__", "").startswith(module.__name__)
        ]
    print(missing, unnamed, names > 200)
    """
    assert with_torch.run(program, MTLFLASHATTN_SHIM="on") == "[] [] True"


def _public_functions(body, prefix=""):
    """`(name, node)` of functions, and of methods of public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name[0] != "_":
            yield from _public_functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name == "__init__"):
            yield prefix + node.name, node


@pytest.mark.parametrize("package", ["flash_attn_mps", "flash_attn_shim"])
def test_every_public_function_is_annotated(package):
    bare = []
    for file in sorted((ROOT / package).rglob("*.py")):
        for name, node in _public_functions(ast.parse(file.read_text()).body):
            arguments = [
                node.args.vararg,
                node.args.kwarg,
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
            ]
            untyped = [a.arg for a in arguments if a and a.annotation is None and a.arg not in ("self", "cls")]
            if untyped or node.returns is None:
                bare.append((file.relative_to(ROOT).as_posix(), name, untyped))
    assert not bare
