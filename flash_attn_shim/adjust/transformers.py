"""transformers: `attn_implementation="flash_attention_2"` loads and runs where the shim serves `flash_attn`.

Tried with 4.57.6 and 5.23.0. transformers finds the presented package and its metadata, but then insists on CUDA
(or MLU, MUSA):

* `is_flash_attn_2_available()` also says yes where the shim serves the call: with MPS, or anywhere under
  `MTLFLASHATTN_SHIM=on`. Replaced at the end of `transformers.utils.import_utils`, before anything takes the
  function from there. What it says about FlashAttention 3 and 4 stays.
* A model whose weights are still on the CPU may be switched to flash_attention_2, as on a CUDA machine. 5.x reads
  the devices from a table; 4.x checks in `PreTrainedModel._flash_attn_2_can_dispatch`, which besides takes "found
  but unavailable" for "available" in a torch that has neither CUDA nor ROCm, and so would break ModernBERT's
  default attention where there is no MPS.
* Attention sinks (`s_aux`: gpt-oss) that FlashAttention 2's functions have no argument for are dropped without a word,
  which gives other numbers. Refused, in `_process_flash_attention_kwargs`.
"""

import functools
import sys

from flash_attn_shim import finder, policy
from flash_attn_shim.adjust import Misfit

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


def refusal():
    """Why transformers is left alone right now, in words; None if the shim serves it."""
    refused = policy.refusal_to_adjust_transformers(finder.environment())
    if refused:
        return refused
    seen, _, why = finder.locate("flash_attn")
    return None if seen else why


def is_usable():
    """Does flash_attention_2 run here through the shim?"""
    return is_usable_on_cpu() or is_usable_on_mps()


def is_usable_on_cpu():
    return policy.mode(finder.environment()) == "on" and not refusal()


def is_usable_on_mps():
    return not refusal() and _has_mps()


def _is_on_cpu(model):
    return {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def _has_mps():
    try:
        import torch

        return torch.backends.mps.is_available()
    except Exception:  # a broken torch: transformers itself will say so
        return False


def adjust_probe(import_utils, undo):
    original = vars(import_utils).get(_PROBE)
    if not callable(original):
        raise Misfit(f"{import_utils.__name__} has no {_PROBE}")

    @functools.wraps(original)
    def probe(*args, **kwargs):
        return is_usable() or original(*args, **kwargs)

    probe.cache_clear = getattr(original, "cache_clear", lambda: None)
    probe._dynamo_marked_constant = True  # torch.compile calls it at trace time, as it does with the original in 5.x
    _replace_everywhere(import_utils, original, probe)
    undo.then(lambda: _replace_everywhere(import_utils, probe, original))

    # Up to 5.10 a dict that is filled at import, and indexed without a look by 5.4 to 5.8.
    mapping = vars(import_utils).get("PACKAGE_DISTRIBUTION_MAPPING")
    if mapping is not None:
        for name in ("flash_attn", "flash_attn_interface"):
            if finder.locate(name)[0]:
                undo.set_item(mapping, name, ["flash-attn"])


def adjust_flash_utils(modeling_flash_attention_utils, undo):
    table = vars(modeling_flash_attention_utils).get(_TABLE)
    process = vars(modeling_flash_attention_utils).get(_PROCESS)
    if table is None and process is None:
        raise Misfit(f"no {_TABLE} before 5.x and no {_PROCESS}")
    if table is not None:
        if not isinstance(table.get(2, {}).get("supported_devices"), tuple):
            raise Misfit(f"{_TABLE}[2] has no tuple of supported_devices")
        devices = (*table[2]["supported_devices"], (is_usable_on_mps, "mps"), (is_usable_on_cpu, "cpu"))
        undo.set_item(table[2], "supported_devices", devices)
    if process is not None:
        undo.set(modeling_flash_attention_utils, _PROCESS, _without_dropping_sinks(process))


def _without_dropping_sinks(original):
    @functools.wraps(original)
    def process(*args, **kwargs):
        passed_on = original(*args, **kwargs)
        if kwargs.get("s_aux") is not None and not passed_on.keys() & {"s_aux", "learnable_sink"}:
            raise NotImplementedError(
                "s_aux: the attention sinks of this model are no argument of FlashAttention 2, and transformers would "
                "leave them out; attn_implementation='mps_fa' (flash_attn_mps.integrations.transformers) computes them"
            )
        return passed_on

    return process


def adjust_cpu_check(modeling_utils, undo):
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
                "mtlflashattn serves flash_attn here, and torch.backends.mps is not available."
            )
        return answer

    undo.set(model_class, "_flash_attn_2_can_dispatch", can_dispatch)


MODULES = {
    "transformers.utils.import_utils": adjust_probe,
    "transformers.modeling_flash_attention_utils": adjust_flash_utils,
    "transformers.modeling_utils": adjust_cpu_check,
}


def catch_up(undo):
    """Mend what modules concluded while the shim was not there. Call it after the functions in `MODULES`."""
    paged = sys.modules.get("transformers.integrations.flash_paged")
    if paged is not None and hasattr(paged, "FLASH_ATTN_VARLEN_FUNC") and is_usable():
        from flash_attn import flash_attn_varlen_func

        undo.set(paged, "FLASH_ATTN_VARLEN_FUNC", flash_attn_varlen_func)

    # 4.57's ModernBERT chooses flash_attention_2 by itself, but without flash_attn at its import it has no rotary
    # embedding for it.
    modernbert = sys.modules.get("transformers.models.modernbert.modeling_modernbert")
    if modernbert is not None and getattr(modernbert, "RotaryEmbedding", None) is object:

        def can_dispatch(self, is_init_check=False):
            raise ImportError(
                f"{modernbert.__name__} was imported before flash_attn_shim.install(): it cannot use flash_attention_2"
            )

        undo.set(modernbert.ModernBertPreTrainedModel, "_flash_attn_2_can_dispatch", can_dispatch)


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
