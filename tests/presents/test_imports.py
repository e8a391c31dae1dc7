"""What programs import from `flash_attn`, and how: names, signatures, and import statements of real programs.

`data/upstream-2.8.3.json` holds the modules of FlashAttention 2.8.3 that are neither triton nor CUDA nor a model zoo,
with their names and signatures; `data/upstream-fa3.json` those of FlashAttention 3's `flash_attn_interface` on the
main branch, of which the former has the older ones. `data/imports.tsv` holds statements of programs.
"""

import ast
import csv
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flash_attn

DATA = Path(__file__).parent / "data"
UPSTREAM = json.loads((DATA / "upstream-2.8.3.json").read_text())
with open(DATA / "imports.tsv", newline="") as _file:
    STATEMENTS = list(
        dict.fromkeys(row["statement"] for row in csv.DictReader(_file, delimiter="\t", quoting=csv.QUOTE_NONE))
    )

# Of upstream's public names, those that only serve its kernels: an import of one fails here.
KERNEL_HELPERS = {
    "flash_attn.ops.activations": {"swiglu_fwd_codestring", "swiglu_bwd_codestring"},
    "flash_attn.ops.layer_norm": {"maybe_align"},
    "flash_attn.ops.triton.layer_norm": {"maybe_contiguous", "maybe_contiguous_lastdim", "triton_autotune_configs"},
    "flash_attn.ops.triton.linear": {"init_to_zero", "get_configs_io_bound"},
}


def imported(statement):
    """`(module, name or None)` for everything that a statement imports."""
    (node,) = ast.parse(statement).body
    if isinstance(node, ast.Import):
        return [(alias.name, None) for alias in node.names]
    return [(node.module, alias.name) for alias in node.names]


def upstream_has(module, name):
    return module in UPSTREAM and (name is None or name in UPSTREAM[module] or f"{module}.{name}" in UPSTREAM)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement(statement, monkeypatch):
    """It resolves where upstream's own Python would, and else fails as a missing module or name does."""
    monkeypatch.setenv("MTLFLASHATTN_SHIM", "on")
    resolves = all(upstream_has(module, name) for module, name in imported(statement))
    resolves = resolves and not any(name in KERNEL_HELPERS.get(module, ()) for module, name in imported(statement))
    if resolves:
        exec(statement, {})
    else:
        with pytest.raises(ImportError):
            exec(statement, {})


SIGNATURES = UPSTREAM | {"flash_attn_interface": json.loads((DATA / "upstream-fa3.json").read_text())}


# What upstream's main branch has added to a signature since.
ADDED = {("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward"): ", num_splits=0"}


def public_names():
    return [
        (module, name)
        for module, names in SIGNATURES.items()
        for name in names
        if name.split(".")[0] not in KERNEL_HELPERS.get(module, ())
    ]


@pytest.mark.parametrize(("module", "name"), public_names())
def test_name_and_signature(module, name, monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_SHIM", "on")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    signature = SIGNATURES[module][name]
    if signature is None:
        return
    signature = signature.removesuffix(")") + ADDED.get((module, name), "") + ")"
    namespace = {"torch": torch, "nn": nn, "F": F}
    exec(f"def upstream{signature}: pass", namespace)
    assert parameters(value) == parameters(namespace["upstream"])


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in KERNEL_HELPERS.items() for n in sorted(names)])
def test_kernel_helper_is_missing(module, name):
    assert name in UPSTREAM[module]
    with pytest.raises(ImportError):
        exec(f"from {module} import {name}", {})


def test_every_file_imports_under_one_name():
    found = {module.name for module in pkgutil.walk_packages(flash_attn.__path__, "flash_attn.")}
    assert found >= {name for name in UPSTREAM if name.startswith("flash_attn.")}
    files = {}
    for name in found:
        module = importlib.import_module(name)
        assert module.__spec__.name == name
        assert files.setdefault(module.__file__, name) == name
        for value in vars(module).values():
            # What is defined here says so, for pickles.
            if inspect.isclass(value) or inspect.isfunction(value):
                assert value.__module__ in sys.modules


def test_nothing_else_is_needed():
    """No triton, no CUDA extension of upstream's, no torchvision and no transformers behind any presented module."""
    program = """
import sys
for name in ("triton", "torchvision", "transformers", "flash_attn_2_cuda", "fused_dense_lib", "dropout_layer_norm"):
    sys.modules[name] = None
import flash_attn_shim
flash_attn_shim.install()
import importlib, pkgutil, flash_attn
assert "torch" not in sys.modules
for module in pkgutil.walk_packages(flash_attn.__path__, "flash_attn."):
    importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("flash_attn.")]))
"""
    root = Path(__file__).parents[2]
    environment = {"MTLFLASHATTN_SHIM": "on", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 25
