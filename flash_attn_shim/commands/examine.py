"""The findings of `mtlflashattn doctor`, as plain data."""

from __future__ import annotations

import os
import platform
import site
import subprocess
import sys
import warnings
from importlib import import_module, metadata
from typing import Any

import flash_attn_shim
from flash_attn_shim import installations, owners, policy
from flash_attn_shim.guests import look

_HOOK_FILES = ("mtlflashattn.pth", "mtlflashattn.start")
_UF_HIDDEN = 0x8000  # macOS: stat.UF_HIDDEN, absent from `stat` elsewhere
_SWITCHES = (
    policy.SWITCH,
    policy.MODULES,
    policy.TRANSFORMERS,
    policy.HIDE,
    policy.FLAGS,
    *(f"MTLFLASHATTN_{name}" for name in ("TRACE", "KERNEL", "VARIANT", "TUNE", "PROVE", "CACHE")),
    *(f"MTLFLASHATTN_SDPA{name}" for name in ("", "_MIN_GB", "_MIN_SEQ", "_FAST_MIN_SEQ")),
)


def everything(programs: list[str]) -> dict[str, Any]:
    """All findings: names, owners, switches, hook, system, attention, libraries, programs, sdpa, advice.

    `programs`: files, directories, modules or packages whose code to look at.
    """
    status = flash_attn_shim.status()  # before anything below imports a library and so changes the answer
    hook = _hook(status)
    attention = _attention()
    findings = {
        "names": [{"name": n.name, "visible": n.visible, "origin": n.origin, "why": _why(n)} for n in status.names],
        "owners": owners.findings(),
        "switches": {name: os.environ.get(name, "(not set)") for name in _SWITCHES},
        "hook": hook,
        "system": _system(),
        "attention": attention,
        "libraries": _libraries(),
        "programs": _programs(status, programs),
    }
    findings["sdpa"] = _sdpa()
    findings["advice"] = [*owners.advice(), *installations.advice(), *_advice(status, findings)]
    return findings


def _why(name):
    fault = None if name.visible else installations.fault(name.name)
    return name.why if fault is None else f"{name.why}, but {fault}"


def _hook(status):
    """Where the start-up files are, whether Python ran them, and if not, why."""
    files = {}
    for path in _hook_paths():
        hidden = bool(getattr(os.stat(path), "st_flags", 0) & _UF_HIDDEN)
        files[path] = "hidden: Python skips it" if hidden else "found"
    return {
        "set in this process": "yes" if status.installed else "no",
        "start-up files": files or "none found",
        "site-packages at start-up": "off (-S)" if sys.flags.no_site else "on",
        "read at start-up": ".start (Python 3.15 and later)" if sys.version_info >= (3, 15) else ".pth",
        "metadata of flash-attn": "announced" if status.metadata is None else f"not announced: {status.metadata}",
    }


def _hook_paths():
    directories = [*site.getsitepackages(), site.getusersitepackages()]
    if ours := owners.our_distribution():
        directories.append(str(ours.locate_file("")))
    found = {}
    for directory in directories:
        for name in _HOOK_FILES:
            path = os.path.join(directory, name)
            if os.path.isfile(path):
                found[os.path.realpath(path)] = path
    return list(found.values())


def _system():
    machine = platform.machine()
    if sys.platform == "darwin" and machine == "x86_64" and "ARM64" in platform.version():
        machine += " (an Intel Python under Rosetta, on Apple silicon)"
    ours = owners.our_distribution()
    return {
        "mtlflashattn": ours.version if ours else "not installed as a distribution",
        "Python": f"{platform.python_version()}, {sys.executable}",
        "platform": f"macOS {_macos()}" if sys.platform == "darwin" else platform.platform(),
        "machine": machine,
    }


def _macos():
    """A Python that was built before macOS 26 is told 16 by `platform` there (python/cpython#135675); sysctl is not."""
    try:
        asked = subprocess.run(
            ["sysctl", "-n", "kern.osproductversion"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return platform.mac_ver()[0]
    return asked.stdout.strip()


def _attention():
    """torch, its Metal support, and which tier of flash_attn_mps would serve a plain call."""
    try:
        import torch
    except Exception as error:  # torch can be missing, or broken in any way
        return {"torch": f"cannot be imported: {type(error).__name__}: {error}"}
    mps = torch.backends.mps
    state = "available" if mps.is_available() else "built, but not available" if mps.is_built() else "not in this torch"
    found = {
        "torch": f"{torch.__version__}, {os.path.dirname(torch.__file__)}",
        "MPS": state,
        "torch.mps.compile_shader": "present" if hasattr(torch.mps, "compile_shader") else "absent",
    }
    if foreign := owners.foreign_package():
        return {**found, "tier": f"none: {foreign}"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who owns the names is said under "Our names"
        from flash_attn_mps import dispatch
        from flash_attn_mps.describe import CallOptions, dense
        from flash_attn_mps.tiers.metal import tensorops_probe

    device = "mps" if mps.is_available() else "cpu"
    q = torch.empty(1, 64, 4, 64, dtype=torch.float16, device=device)
    p = dense(q, q, q, CallOptions(causal=True))
    refusals = dispatch.explain(p)
    found[f"tier for a causal float16 call on {device}"] = _first_without(refusals)
    found["tier for its gradients"] = _first_without(dispatch.explain_gradients(p))
    for name, reasons in refusals.items():
        if reasons:
            found[f"tier {name} not used"] = "; ".join(reasons)
    found["tensor operations"] = tensorops_probe.described()
    found["tuned variants"] = _tuned()
    return found


def _first_without(reasons_of_tiers):
    return next(name for name, reasons in reasons_of_tiers.items() if not reasons)


def _tuned():
    """For how many classes of calls `mtlflashattn tune` has saved a variant here, or why its file is ignored."""
    from flash_attn_mps.tiers.metal import store

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        winners = store.load()
    if caught:
        return str(caught[0].message)
    return f"for {len(winners)} classes of calls, in {store.path()}" if winners else "none; run `mtlflashattn tune`"


def _sdpa():
    """torch's own attention: is it served, and what is known to be wrong with it?"""
    if owners.foreign_package():
        return {"scaled_dot_product_attention": "not examined: flash_attn_mps is another project's"}
    try:
        from flash_attn_mps import mha, sdpa
        from flash_attn_mps.sdpa import hazards, serve
    except Exception as error:  # torch can be missing, or broken in any way
        return {"scaled_dot_product_attention": f"could not be asked: {type(error).__name__}: {error}"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said above
        given = serve.current()
    known = [
        f"{hazard.issue} ({', '.join(hazard.routes)} path): {hazard.what}"
        for hazard in hazards.TABLE
        if hazard.holds(given.torch)
    ]
    return {
        "scaled_dot_product_attention": "served on MPS"
        if sdpa.is_installed()
        else f"torch's own ({sdpa.SWITCH}=on serves it on MPS)",
        "nn.MultiheadAttention": "usual strides" if mha.is_installed() else "torch's own",
        f"known MPS bugs in torch {'.'.join(map(str, given.torch))}": known or "none",
        "budget of its score matrix": f"{given.budget / (1 << 30):.3g} GB",
        "lengths measured": f"for {len(given.measured)} kinds of calls" if given.measured else "none",
    }


def _libraries():
    """What libraries that ask for flash_attn conclude here."""
    return {
        "transformers": _transformers(),
        "diffusers": _diffusers(),
    }


def _transformers():
    version = _version("transformers")
    if version is None:
        return "not installed"
    try:
        utils = import_module("transformers.utils")
        answer = utils.is_flash_attn_2_available()
    except Exception as error:
        return f"{version}: could not be asked: {type(error).__name__}: {error}"
    after = flash_attn_shim.status()
    adjusted = "adjusted" if after.transformers is None else f"left alone: {after.transformers}"
    return [
        version,
        f'is_flash_attn_2_available() is {answer}: attn_implementation="flash_attention_2" '
        + ("loads" if answer else "is refused"),
        adjusted,
    ]


def _diffusers():
    version = _version("diffusers")
    if version is None:
        return "not installed"
    try:
        answer = import_module("diffusers.utils.import_utils").is_flash_attn_available()
    except Exception as error:
        return f"{version}: could not be asked: {type(error).__name__}: {error}"
    return [version, f"is_flash_attn_available() is {answer}"]


def _programs(status, programs):
    """What programs get because of what their code shows or the user says."""
    if status.programs is not None:
        return {"left alone": status.programs}
    found: dict[str, list[str]] = {}
    for flag in status.flags:
        found.setdefault(flag.module, []).append(f"{flag.name} = {flag.value!r}: {policy.FLAGS} asks for it")
    for decision in flash_attn_shim.status().decisions:  # of the libraries that were imported above
        found.setdefault(decision.who, []).append(decision.what)
    for program in programs:
        found.update(look.decisions(program))
    return found or {"decided": "nothing yet; `mtlflashattn doctor FILE` says what the code of a program decides"}


def _version(distribution):
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _advice(status, findings):
    """What to do about each thing that stands in the way, one sentence each."""
    if status.unknown_mode is not None:
        yield f"{policy.SWITCH}={status.unknown_mode} is not a known value and counts as auto. Known: off, auto, on."
    files = findings["hook"]["start-up files"]
    if isinstance(files, dict):
        for path, state in files.items():
            if state != "found":
                yield f"The start-up file is hidden, so Python skips it: chflags nohidden '{path}'"
    if not status.installed:
        if sys.flags.no_site:
            reason = "Python runs with -S, so site-packages' start-up files did not run"
        elif files == "none found":
            reason = "no start-up file was found (an install with --target, a zipapp or a frozen program has none)"
        else:
            reason = "the start-up file did not run"
        yield f"The import hook is not set: {reason}. Call flash_attn_shim.install() first, or use `mtlflashattn run`."
    if "Rosetta" in findings["system"]["machine"]:
        yield "Install an arm64 build of Python: an Intel build cannot use Metal."
    torch = findings["attention"]
    if torch["torch"].startswith("cannot"):
        yield "Install PyTorch: pip install torch"
    elif sys.platform == "darwin" and torch["MPS"] != "available":
        yield "This torch cannot use Metal here: MPS needs macOS 14 or later and an arm64 build of torch."
    shown = {name["name"]: name for name in findings["names"]}["flash_attn"]
    if not shown["visible"] and status.mode == "auto" and "not macOS" in shown["why"]:
        yield f"To develop or test Mac-bound code here, on the CPU: set {policy.SWITCH}=on."
