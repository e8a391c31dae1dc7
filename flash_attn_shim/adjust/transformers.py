"""transformers: `attn_implementation="flash_attention_2"` loads and runs where the shim serves `flash_attn`.

Tried with the newest release of each minor version from 4.48 to 5.23. transformers finds the presented package and its
metadata, but then insists on CUDA (or MLU, MUSA):

* `is_flash_attn_2_available()` also says yes where the shim serves the call: with MPS, or anywhere under
  `MTLFLASHATTN_SHIM=on`. Replaced at the end of `transformers.utils.import_utils`, before anything takes the
  function from there. What it says about FlashAttention 3 and 4 stays.
* A model whose weights are still on the CPU may be switched to flash_attention_2, as on a CUDA machine. 5.x reads
  the devices from a table; 4.x checks in `PreTrainedModel._flash_attn_2_can_dispatch`, which besides takes "found
  but unavailable" for "available" in a torch that has neither CUDA nor ROCm, and so would break ModernBERT's
  default attention where there is no MPS.

What its path to FlashAttention 2 gets wrong, or leaves out because upstream's kernel does not have it:

* In float32 it looks for a `torch.nn.Linear` in the attention module; GPT-2 has none, which ends in StopIteration.
* Attention sinks (`s_aux`: GPT-OSS) are dropped silently, since upstream's functions have no argument for them; the
  numbers are then wrong. Ours take them; where a function does not, `_process_flash_attention_kwargs` raises.
* 4.54 takes the positions of one row for those of the whole batch.

Under `MTLFLASHATTN_TRANSFORMERS=off` `flash_attn` can be imported and has no metadata. transformers would trip over
that (KeyError from 5.4 to 5.9, PackageNotFoundError in 4.x); it is told that there is no `flash_attn`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType

from flash_attn_shim import finder, policy
from flash_attn_shim.adjust.changes import Misfit, Undo
from flash_attn_shim.autoload import PRESENTED

PROBES = "transformers.utils.import_utils"

_PROBE = "is_flash_attn_2_available"
_TABLE = "FLASH_ATTENTION_COMPATIBILITY_MATRIX"
_PROCESS = "_process_flash_attention_kwargs"

# What transformers has cached about flash_attn if it was asked before the shim was there.
_CACHES = (
    "_package_distribution_mapping",
    "_is_package_available",
    "is_flash_attn_3_available",
    "is_flash_attn_4_available",
    "is_flash_attn_greater_or_equal",
    "is_flash_attn_greater_or_equal_2_10",
)


def refusal() -> str | None:
    """Why transformers is left alone right now, in words; None if the shim serves it."""
    refused = policy.refusal_to_adjust_transformers(finder.environment())
    if refused:
        return refused
    seen, _, why = finder.locate("flash_attn")
    return None if seen else why


def hides() -> bool:
    """Is transformers alone to see no flash_attn, while others may?"""
    env = finder.environment()
    return bool(policy.refusal_to_adjust_transformers(env)) and not policy.refusal("flash_attn", env)


def is_usable() -> bool:
    """Does flash_attention_2 run here through the shim?"""
    return is_usable_on_cpu() or is_usable_on_mps()


def is_usable_on_cpu() -> bool:
    return policy.mode(finder.environment()) == "on" and not refusal()


def is_usable_on_mps() -> bool:
    return not refusal() and _has_mps()


def _is_on_cpu(model):
    return {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def _has_mps():
    try:
        import torch

        return torch.backends.mps.is_available()
    except Exception:  # a broken torch: transformers itself will say so
        return False


def adjust_probe(import_utils: ModuleType, undo: Undo) -> str | None:
    if refusal():
        return _hide(import_utils, undo)
    original = vars(import_utils).get(_PROBE)
    if not callable(original):
        raise Misfit(f"{import_utils.__name__} has no {_PROBE}")

    @functools.wraps(original)
    def probe(*args, **kwargs):
        return is_usable() or original(*args, **kwargs)

    vars(probe)["cache_clear"] = getattr(original, "cache_clear", lambda: None)
    # torch.compile calls it at trace time, as it does with the original in 5.x.
    vars(probe)["_dynamo_marked_constant"] = True
    _replace_everywhere(import_utils, original, probe)
    undo.then(lambda: _replace_everywhere(import_utils, probe, original))
    _name_distributions(import_utils, undo, ["flash-attn"])
    return None


def _hide(import_utils, undo):
    original = vars(import_utils).get("_is_package_available")
    if not callable(original):
        raise Misfit(f"{import_utils.__name__} has no _is_package_available")

    @functools.wraps(original)
    def is_available(pkg_name, *args, **kwargs):
        hidden = pkg_name in PRESENTED and hides() and finder.locate(pkg_name)[0]
        return original("flash_attn_that_is_hidden" if hidden else pkg_name, *args, **kwargs)

    vars(is_available)["cache_clear"] = getattr(original, "cache_clear", lambda: None)
    undo.set(import_utils, "_is_package_available", is_available)
    _name_distributions(import_utils, undo, [])
    return f"left alone, and told that there is no flash_attn: {refusal()}"


def _name_distributions(import_utils, undo, distributions):
    """Up to 5.10 a dict that is filled at import, and indexed without a look by 5.4 to 5.9."""
    mapping = vars(import_utils).get("PACKAGE_DISTRIBUTION_MAPPING")
    if mapping is not None:
        for name in PRESENTED:
            if finder.locate(name)[0]:
                undo.set_item(mapping, name, distributions)


def adjust_attention(modeling_flash_attention_utils: ModuleType, undo: Undo) -> None:
    if refusal():
        raise Misfit(refusal())
    utils = vars(modeling_flash_attention_utils)
    table = utils.get(_TABLE)
    if table is not None and not isinstance(table.get(2, {}).get("supported_devices"), tuple):
        raise Misfit(f"{_TABLE}[2] has no tuple of supported_devices")
    process, positions = utils.get(_PROCESS), utils.get("_prepare_from_posids")
    takes_sinks = callable(process) and "s_aux" in inspect.signature(process).parameters
    # 4.54 packs every call that has position_ids, of which its models pass one row for all sequences.
    packs_always = callable(positions) and "_is_packed_sequence" not in utils
    if table is None and not takes_sinks and not packs_always:
        raise Misfit(f"no {_TABLE} before 5.x; the device check is in transformers.modeling_utils")
    if takes_sinks:
        undo.set(modeling_flash_attention_utils, "_lazy_imports", _with_sinks(utils["_lazy_imports"]))
        undo.set(modeling_flash_attention_utils, _PROCESS, _without_dropping_sinks(process))
    if packs_always:
        undo.set(modeling_flash_attention_utils, "_prepare_from_posids", _with_all_positions(positions))
    if table is not None:
        devices = (*table[2]["supported_devices"], (is_usable_on_mps, "mps"), (is_usable_on_cpu, "cpu"))
        undo.set_item(table[2], "supported_devices", devices)


def _with_sinks(lazy_imports):
    """transformers hands over `s_aux` if the function has a parameter of that name."""

    @functools.wraps(lazy_imports)
    def imports(*args, **kwargs):
        found = lazy_imports(*args, **kwargs)
        flash_attn = sys.modules.get("flash_attn")
        if flash_attn is None or not finder.is_ours(flash_attn) or found[0] is not flash_attn.flash_attn_func:
            return found
        from flash_attn_mps.integrations import transformers_fa2

        return (transformers_fa2.flash_attn_func, transformers_fa2.flash_attn_varlen_func, *found[2:])

    return imports


def _with_all_positions(prepare):
    @functools.wraps(prepare)
    def prepare_from_posids(query, key, value, position_ids):
        return prepare(query, key, value, position_ids.expand(query.shape[0], -1).contiguous())

    return prepare_from_posids


def adjust_float32(flash_attention: ModuleType, undo: Undo) -> None:
    if refusal():
        raise Misfit(refusal())
    original = vars(flash_attention).get("flash_attention_forward")
    if not callable(original):
        raise Misfit(f"{flash_attention.__name__} has no flash_attention_forward")

    @functools.wraps(original)
    def forward(module, query, *args, **kwargs):
        import torch

        if query.dtype == torch.float32 and not any(isinstance(part, torch.nn.Linear) for part in module.modules()):
            module = _WithLinear(module)
        return original(module, query, *args, **kwargs)

    undo.set(flash_attention, "flash_attention_forward", forward)


class _WithLinear:
    """A module that has a `torch.nn.Linear` in float32 too."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def modules(self):
        import torch

        yield from self._module.modules()
        yield torch.nn.Linear(1, 1, device="meta", dtype=torch.float32)


def _without_dropping_sinks(original):
    @functools.wraps(original)
    def process(*args, **kwargs):
        passed_on = original(*args, **kwargs)
        if kwargs.get("s_aux") is not None and not passed_on.keys() & {"s_aux", "learnable_sink"}:
            raise NotImplementedError(
                "s_aux: FlashAttention 2 has no argument for this model's attention sinks, so transformers would drop "
                "them; use attn_implementation='mps_fa' (flash_attn_mps.integrations.transformers), which computes them"
            )
        return passed_on

    return process


def adjust_cpu_check(modeling_utils: ModuleType, undo: Undo) -> str | None:
    if refusal():
        return _refuse_flash_attention_2(modeling_utils, undo)
    model_class = vars(modeling_utils).get("PreTrainedModel")
    original = vars(model_class).get("_flash_attn_2_can_dispatch") if model_class else None
    if original is None:
        raise Misfit(f"no PreTrainedModel._flash_attn_2_can_dispatch; 5.x reads its devices from {_TABLE}")

    @functools.wraps(original)
    def can_dispatch(self, is_init_check=False):
        served = is_usable() and not getattr(self, "use_bettertransformer", False)
        answer = original(self, is_init_check or (served and _is_on_cpu(self)))
        if not refusal() and not vars(modeling_utils)[_PROBE]():
            raise ImportError(
                "FlashAttention2 has been toggled on, but it cannot be used due to the following error: "
                "mtlflashattn provides flash_attn here, but torch.backends.mps is not available."
            )
        return answer

    undo.set(model_class, "_flash_attn_2_can_dispatch", can_dispatch)
    return None


def _refuse_flash_attention_2(modeling_utils, undo):
    """4.x looks for the package by itself, and then reads metadata that are not there."""
    model_class = vars(modeling_utils).get("PreTrainedModel")
    for name in ("_flash_attn_2_can_dispatch", "_check_and_enable_flash_attn_2"):
        original = vars(model_class).get(name) if model_class else None
        if original is None:
            continue
        function = getattr(original, "__func__", original)

        def check(model, *args, function=function, **kwargs):
            if hides():
                raise ImportError(
                    "FlashAttention2 has been toggled on, but it cannot be used due to the following error: "
                    f"{refusal()}"
                )
            return function(model, *args, **kwargs)

        undo.set(model_class, name, classmethod(check) if isinstance(original, classmethod) else check)
        return f"left alone, and refuses flash_attention_2: {refusal()}"
    raise Misfit(refusal())


MODULES = {
    PROBES: adjust_probe,
    "transformers.integrations.flash_attention": adjust_float32,
    "transformers.modeling_flash_attention_utils": adjust_attention,
    "transformers.modeling_utils": adjust_cpu_check,
}


def catch_up(undo: Undo) -> None:
    """Fix what modules cached while the shim was not active. Call it after the functions in `MODULES`."""
    paged = sys.modules.get("transformers.integrations.flash_paged")
    if paged is not None and hasattr(paged, "FLASH_ATTN_VARLEN_FUNC") and is_usable():
        from flash_attn import flash_attn_varlen_func

        undo.set(paged, "FLASH_ATTN_VARLEN_FUNC", flash_attn_varlen_func)

    modernbert = modernbert_without_flash_attn()
    if modernbert is not None:  # it would choose flash_attention_2 by itself

        def can_dispatch(self, is_init_check=False):
            raise ImportError(
                f"{modernbert.__name__} was imported before flash_attn_shim.install(): it cannot use flash_attention_2"
            )

        undo.set(modernbert.ModernBertPreTrainedModel, "_flash_attn_2_can_dispatch", can_dispatch)


def modernbert_without_flash_attn() -> ModuleType | None:
    """4.57's module of ModernBERT if flash_attn was not there at its import: it has no rotary embedding for it then."""
    module = sys.modules.get("transformers.models.modernbert.modeling_modernbert")
    return module if getattr(module, "RotaryEmbedding", None) is object else None


def _replace_everywhere(import_utils, old, new):
    """Exchange the probe in every module that took it and in 5.x's table, and forget cached answers."""
    for module in [import_utils, *sys.modules.values()]:
        namespace = getattr(module, "__dict__", {})
        if namespace.get(_PROBE) is old:
            setattr(module, _PROBE, new)
    utils = sys.modules.get("transformers.modeling_flash_attention_utils")
    entry = vars(utils).get(_TABLE, {}).get(2, {}) if utils is not None else {}
    if entry.get("general_availability_check") is old:
        entry["general_availability_check"] = new
    for name in _CACHES:
        clear = getattr(vars(import_utils).get(name), "cache_clear", None)
        if clear is not None:
            clear()
    for probe in (old, new):
        getattr(probe, "cache_clear", lambda: None)()
