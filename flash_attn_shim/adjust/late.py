"""What a late `install()` finds: modules that checked for flash_attn before the hook was active, and cached the answer.

What can be fixed is fixed; one warning names the other modules, and what to do. If the hook was set but switched off,
no program may ever call `install()`; then the first lookup of flash_attn warns about the libraries.
"""

from __future__ import annotations

import sys

from flash_attn_shim import finder
from flash_attn_shim.adjust import diffusers, transformers
from flash_attn_shim.adjust.changes import Misfit, Undo, journal

_PROBES = ("is_flash_attn_available", "is_flash_attn_2_available")

#: What models of transformers import behind a probe at their top, and from where.
_BEHIND_PROBES = {
    "_flash_attention_forward": "transformers.modeling_flash_attention_utils",
    "get_target_dtype": "transformers.integrations.flash_attention",
}

_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")

_warned: set[str] = set()


def mend(undo: Undo) -> list[str]:
    """Give modules what they did not import; return the names of those that cannot be fixed."""
    from flash_attn_shim import metadata

    if metadata.refusal():  # then transformers and diffusers would not have found it either
        return []
    beyond = []
    try:
        diffusers.catch_up(undo)
    except Misfit:
        beyond.append("diffusers")
    for name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", {})
        if name.startswith("transformers.models."):
            if any(probe in namespace for probe in _PROBES):
                _mend_model(module, undo)
        elif not name.startswith(("transformers.", "diffusers.", "flash_attn")) and _gave_up(namespace):
            beyond.append(name)
    modernbert = transformers.modernbert_without_flash_attn()
    if modernbert is not None:
        beyond.append(modernbert.__name__)
    return sorted(beyond)


def warn(modules: list[str]) -> None:
    """Say once what could not be fixed, and what to do."""
    unsaid = [name for name in modules if name not in _warned]
    _warned.update(unsaid)
    if unsaid:
        finder.warn(
            f"{', '.join(unsaid)} was imported before flash_attn_shim.install() and will not use flash_attn: call "
            "install() before importing it. An installed mtlflashattn does that when Python starts; `mtlflashattn "
            "doctor` says why it did not happen here."
        )


def warn_of_libraries() -> None:
    """flash_attn is being looked up: say once which libraries checked for it too early and were not adjusted."""
    early = []
    if transformers.PROBES in sys.modules and transformers.PROBES not in journal:
        early.append("transformers")
    if vars(sys.modules.get(diffusers.UTILS, sys)).get("_flash_attn_available") is False:
        early.append("diffusers")
    unsaid = [name for name in early if name not in _warned]
    if unsaid and transformers.refusal() is None:
        _warned.update(unsaid)
        finder.warn(
            f"{' and '.join(unsaid)} checked for flash_attn before it was available, and will not use "
            "it: call flash_attn_shim.install(), which fixes that."
        )


def _mend_model(module, undo):
    for name, home in _BEHIND_PROBES.items():
        if name not in vars(module) and hasattr(sys.modules.get(home), name):
            undo.set(module, name, getattr(sys.modules[home], name))


def _gave_up(namespace):
    """Did a module set a function of flash_attn to None? Or, for a model's remote code, ask for it and import none?"""
    if any(name in namespace and namespace[name] is None for name in _FUNCTIONS):
        return True
    remote = str(namespace.get("__name__")).startswith("transformers_modules.")
    asked = any(probe in namespace for probe in _PROBES)
    return remote and asked and not any(name in namespace for name in (*_FUNCTIONS, *_BEHIND_PROBES))
