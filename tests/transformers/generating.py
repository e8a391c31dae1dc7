"""Sequences decoded token by token by a tiny Llama with grouped heads. Run as a program; prints JSON.

    python generating.py tier ...

For each tier, "torch" or "metal" (that which serves a call among the Metal ones, on the runner), and each kind of
cache: the tokens, and how many calls which tier served.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import tiny
import torch
import transformers

import flash_attn_shim
from flash_attn_mps import trace

sys.path.append(str(Path(__file__).resolve().parents[2]))
PROMPTS, LENGTH, NEW = 8, 80, 6
KINDS = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "padded": {},
}


def prompts(kind):
    """Of one length, or padded on the left, so that they come packed."""
    ids = torch.randint(3, tiny.VOCABULARY, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    padding = torch.zeros_like(ids)
    if kind == "padded":
        padding = (torch.arange(LENGTH) < torch.arange(PROMPTS)[:, None]).long()
    return {"input_ids": ids * (1 - padding), "attention_mask": 1 - padding}


def main(tiers):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    trace.enable()
    flash_attn_shim.install()
    from tests.metal_tiers import metal_on

    results = {}
    torch.manual_seed(0)
    configuration = tiny.of("llama", **tiny.GROUPED, **tiny.BIG)()
    model = transformers.LlamaForCausalLM._from_config(configuration, attn_implementation="flash_attention_2").eval()
    for tier in tiers:
        os.environ["MTLFLASHATTN_KERNEL"] = "auto" if tier == "metal" else tier
        results[tier] = {}
        for kind, how in KINDS.items():
            trace.clear()
            with metal_on("cpu" if tier == "metal" else "mps"):
                tokens = model.generate(**prompts(kind), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **how)
            served = Counter()
            for call, count in trace.calls.items():
                served[call.tier] += count
            results[tier][kind] = {"tokens": tokens[:, LENGTH:].tolist(), "served": served}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
