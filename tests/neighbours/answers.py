"""Prints, as JSON, everything that the libraries at hand conclude about flash_attn: for comparing two environments.

    python answers.py [--look-ups-only]

Run in an interpreter of its own: libraries ask once and keep the answer.
"""

import importlib
import importlib.metadata
import importlib.util
import io
import json
import pkgutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

NAMES = (
    "flash_attn",
    "flash_attn.bert_padding",
    "flash_attn.cute",
    "flash_attn.flash_attn_interface",
    "flash_attn_2_cuda",
    "flash_attn_3",
    "flash_attn_interface",
    "flash_attn_triton",
)

OURS = ("flash_attn_shim", "flash_attn_mps")

#: Modules whose `is_...` functions are asked, where they are installed.
PROBES = (
    "accelerate.utils",
    "diffusers.utils",
    "diffusers.utils.import_utils",
    "peft.import_utils",
    "sentence_transformers.util",
    "transformers.utils",
    "transformers.utils.import_utils",
    "trl.import_utils",
)

ALSO = ("accelerate", "diffusers", "peft", "sentence_transformers", "timm", "torch", "transformers", "trl", "xformers")


def outcome(function, *arguments, **kwargs):
    """What a call gives, as text; an exception is an answer too."""
    try:
        return repr(function(*arguments, **kwargs))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def lookups():
    answers = {}
    for name in NAMES:
        answers[f"spec of {name}"] = outcome(importlib.util.find_spec, name)
        answers[f"import of {name}"] = outcome(importlib.import_module, name)
    for name in ("flash_attn", "flash-attn", "Flash.Attn", "flash_attn_3", "flash-attn-3", "flash_attn_interface"):
        answers[f"version of {name}"] = outcome(importlib.metadata.version, name)
        answers[f"requirements of {name}"] = outcome(importlib.metadata.requires, name)
        answers[f"distributions of {name}"] = outcome(
            lambda name=name: list(importlib.metadata.distributions(name=name))
        )
    packages = importlib.metadata.packages_distributions()
    answers["packages"] = sorted(name for name in packages if "flash" in name and not name.startswith(OURS))
    answers["modules on disk"] = sorted(
        module.name for module in pkgutil.iter_modules() if "flash" in module.name and not module.name.startswith(OURS)
    )
    return answers


def installed():
    return [name for name in ALSO if importlib.util.find_spec(name) is not None]


def probes():
    answers = {}
    for name in PROBES:
        if name.partition(".")[0] not in installed():
            continue
        answers[name] = outcome(importlib.import_module, name).partition(" from ")[0]
        for probe in dir(sys.modules.get(name)):
            if probe.startswith(("is_", "_is_")) and callable(getattr(sys.modules[name], probe)):
                answers[f"{name}.{probe}"] = outcome(getattr(sys.modules[name], probe))
    return answers


def torch_answers():
    import torch

    return {
        "is_flash_attention_available": outcome(torch.backends.cuda.is_flash_attention_available),
        "flash_sdp_enabled": outcome(torch.backends.cuda.flash_sdp_enabled),
        "torch.ops.flash_attn": sorted(name for name in dir(torch.ops.flash_attn) if "flash" in name),
        "sdpa": repr(torch.nn.functional.scaled_dot_product_attention),
        "modules": sorted(name for name in sys.modules if name.partition(".")[0] in (*NAMES, "flash_attn_mps")),
    }


def transformers_answers():
    import torch
    from transformers import (
        AttentionInterface,
        LlamaConfig,
        LlamaForCausalLM,
        ModernBertConfig,
        ModernBertModel,
        dynamic_module_utils,
        modeling_flash_attention_utils,
    )

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    answers = {"implementations": sorted(AttentionInterface().valid_keys())}
    for name in ("flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa", None):

        def load(name=name):
            config = LlamaConfig(vocab_size=16, **sizes)
            return LlamaForCausalLM._from_config(config, attn_implementation=name).config._attn_implementation

        answers[f"Llama with {name}"] = outcome(load)
        answers[f"Llama in bfloat16 with {name}"] = outcome(
            lambda name=name: (
                LlamaForCausalLM._from_config(
                    LlamaConfig(vocab_size=16, **sizes), attn_implementation=name, dtype=torch.bfloat16
                ).dtype
            )
        )

    def modernbert():
        torch.manual_seed(0)
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 0)
        model = ModernBertModel(ModernBertConfig(vocab_size=16, **sizes, **special)).eval()
        out = model(torch.arange(8).reshape(2, 4)).last_hidden_state
        return model.config._attn_implementation, round(out.abs().sum().item(), 3)

    answers["ModernBERT by itself"] = outcome(modernbert)
    with tempfile.TemporaryDirectory() as directory:
        remote = Path(directory, "remote.py")
        for line in (
            "import flash_attn",
            "from flash_attn.bert_padding import pad_input",
            "import flash_attn_interface",
        ):
            remote.write_text(line + "\n")
            answers[f"check_imports of {line}"] = outcome(dynamic_module_utils.check_imports, str(remote))
    for name in dir(modeling_flash_attention_utils):
        value = getattr(modeling_flash_attention_utils, name)
        if isinstance(value, dict):
            answers[f"table {name}"] = sorted(map(str, value))
    table = getattr(modeling_flash_attention_utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {})
    for version, entry in table.items():
        answers[f"devices of {version}"] = [
            (name, outcome(check)) for check, name in entry.get("supported_devices", ()) if callable(check)
        ]
        answers[f"availability of {version}"] = outcome(entry.get("general_availability_check"))
    return answers


def diffusers_answers():
    from diffusers.models import attention_dispatch

    answers = {}
    for name in dir(attention_dispatch):
        if name.startswith(("_CAN_USE", "_wrapped", "flash_attn")):
            answers[name] = repr(getattr(attention_dispatch, name))
    for backend in attention_dispatch.AttentionBackendName:
        check = attention_dispatch._check_attention_backend_requirements
        answers[f"backend {backend.value}"] = outcome(check, backend)
    return answers


def xformers_answers():
    flash = importlib.import_module("xformers.ops.fmha.flash")
    return {name: repr(getattr(flash, name)) for name in ("FLASH_VERSION", "_flash_attn_cuda")}


def all_answers():
    answers = {"look-ups": lookups()}
    if "--look-ups-only" in sys.argv:
        return answers
    answers["probes"] = probes()
    for name, ask in (
        ("torch", torch_answers),
        ("transformers", transformers_answers),
        ("diffusers", diffusers_answers),
        ("xformers", xformers_answers),
    ):
        if name in installed():
            try:
                answers[name] = ask()
            except Exception as error:
                answers[name] = f"{type(error).__name__}: {error}"
    answers["look-ups at the end"] = lookups()
    return answers


if __name__ == "__main__":
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        answers = all_answers()
    print(json.dumps(answers, indent=1, sort_keys=True))
