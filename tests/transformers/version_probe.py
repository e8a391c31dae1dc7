"""What one version of transformers concludes about flash attention, printed as JSON. Run by `versions.py`."""

import copy
import json
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import import_utils

torch.set_num_threads(1)
ATTENTIONS = ("eager", "flash_attention_2")


def probes():
    """Every function about flash attention -> what it answers, as text; errors too."""
    calls = {name: () for name in dir(import_utils) if name.startswith("is_flash_attn")}
    asked = {}
    for name in calls:
        versions = ("2.3.3", "2.9.0") if name == "is_flash_attn_greater_or_equal" else (None,)
        for version in versions:
            key = name if version is None else f"{name}({version})"
            try:
                asked[key] = str(getattr(import_utils, name)(*(() if version is None else (version,))))
            except Exception as error:
                asked[key] = f"{type(error).__name__}: {error}"
    return asked


def differences():
    """case -> largest difference of a tiny Llama from eager attention, relative; generated tokens that differ."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    pair = []
    for attention in ATTENTIONS:
        torch.manual_seed(0)
        # A copy each: the attention is written into the configuration that a model is made from.
        pair.append(LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=attention).eval())
    assert [model.config._attn_implementation for model in pair] == list(ATTENTIONS)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = {}
    for name, keywords in {"whole": {}, "padded": {"attention_mask": mask}}.items():
        with torch.no_grad():
            expected, got = (model(ids, **keywords).logits for model in pair)
        if keywords:
            expected, got = expected[mask.bool()], got[mask.bool()]
        found[name] = ((expected - got).abs().max() / expected.abs().max()).item()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = [model.generate(ids, attention_mask=mask, **options) for model in pair]
    found["generate"] = (tokens[0] != tokens[1]).sum().item()
    gradients = []
    for model in pair:
        # The first token of a sequence is no label: what is at padding would be asked for it.
        labels = ids.masked_fill(mask.cumsum(1) <= 1, -100)
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    found["gradients"] = ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item()
    return found


answer = {"version": transformers.__version__, "probes": probes(), "differences": {}}
try:
    answer["differences"] = differences()
    small = all(value < 1e-5 for value in answer["differences"].values())
    answer["flash"] = "equal" if small else f"differs: {answer['differences']}"
except Exception as error:
    answer["flash"] = f"{type(error).__name__}: {error}"
if "flash_attn_shim" in sys.modules:
    import flash_attn_shim
    from flash_attn_shim.commands.examine import _transformers

    answer["adjusted"] = flash_attn_shim.status().transformers or "adjusted"
    answer["doctor"] = _transformers(flash_attn_shim.status())
print(json.dumps(answer))
