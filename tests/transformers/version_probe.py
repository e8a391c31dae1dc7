"""What one version of transformers concludes about flash attention under each setting, printed as JSON: setting ->
answers. Run by `versions.py`, which writes the settings on standard input: setting -> environment variables, or null
for an interpreter without this project.

Each setting has a process of its own, in which transformers is imported for the first time. They are forked from one
that has imported torch: importing it takes longer than all that is asked, and it looks up nothing that the hook serves.
"""

import json
import multiprocessing
import os
import site
import sys
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed.tensor

ROOT = Path(__file__).resolve().parents[2]


def main():
    settings = json.load(sys.stdin)
    assert not [name for name in sys.modules if name.startswith(("transformers", "flash_attn"))]
    print(json.dumps({name: answers_in_a_fork(variables) for name, variables in settings.items()}))


def answers_in_a_fork(variables):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(answers(variables)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"ended with {process.exitcode}"}
    finally:
        process.join()


def answers(variables):
    torch.set_num_threads(1)
    if variables is not None:
        os.environ.update(variables)
        site.addsitedir(str(ROOT))  # runs mtlflashattn.pth, as the start of an interpreter does
    try:
        import transformers
        from transformers.utils import import_utils

        answer = {"version": transformers.__version__, "probes": probes(import_utils)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        answer["differences"], answer["served"] = compared()
        small = all(value < 1e-5 for value in answer["differences"].values())
        answer["flash"] = "equal" if small else f"differs: {answer['differences']}"
    except Exception as error:
        answer["flash"] = f"{type(error).__name__}: {error}"
    if variables is not None:
        import flash_attn_shim
        from flash_attn_shim.commands.examine import _transformers

        answer["adjusted"] = flash_attn_shim.status().transformers or "adjusted"
        answer["doctor"] = _transformers(flash_attn_shim.status())
    return answer


def probes(import_utils):
    """Every function about flash attention -> what it answers, as text; errors too."""
    asked = {}
    for name in dir(import_utils):
        if not name.startswith("is_flash_attn"):
            continue
        versions = ("2.3.3", "2.9.0") if name == "is_flash_attn_greater_or_equal" else (None,)
        for version in versions:
            key = name if version is None else f"{name}({version})"
            try:
                asked[key] = str(getattr(import_utils, name)(*(() if version is None else (version,))))
            except Exception as error:
                asked[key] = f"{type(error).__name__}: {error}"
    return asked


def compared():
    """case -> largest difference from eager attention, relative; in how many calls flash_attn_mps served it."""
    # The one that may be refused first: without this project nothing of it can be imported.
    computed, served = {}, {}
    for attention in ("flash_attention_2", "eager"):
        computed[attention], served[attention] = {}, {}
        for case, compute in cases(attention).items():
            calls = calls_served()
            computed[attention][case] = compute()
            served[attention][case] = calls_served() - calls
    assert not any(served["eager"].values()), served["eager"]
    pairs = {case: (expected, computed["flash_attention_2"][case]) for case, expected in computed["eager"].items()}
    differences = {case: ((one - other).abs().max() / one.abs().max()).item() for case, (one, other) in pairs.items()}
    differences["generate"] = (pairs["generate"][0] != pairs["generate"][1]).sum().item()
    return differences, served["flash_attention_2"]


def calls_served():
    from flash_attn_mps import trace

    trace.enable()
    return sum(trace.calls.values())


def cases(attention):
    """case -> function that computes it with a tiny model: logits, generated tokens, or all gradients in a row."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(llama, attn_implementation=attention).eval()
    gpt2 = GPT2LMHeadModel._from_config(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.3), attn_implementation=attention
    ).eval()
    assert [m.config._attn_implementation for m in (model, gpt2)] == [attention] * 2
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    @torch.no_grad()
    def packed():
        """Both sequences in one row, told apart by their positions; FlashAttention alone does this."""
        if attention == "eager":
            return model(ids).logits
        positions = torch.arange(9).repeat(2)[None]
        return model(ids.reshape(1, 18), position_ids=positions).logits.reshape(2, 9, -1)

    def gradients():
        # The first token of a sequence is no label: what is at padding would be asked for it.
        labels = ids.masked_fill(mask.cumsum(1) <= 1, -100)
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return {
        "whole": torch.no_grad()(lambda: model(ids).logits),
        "padded": torch.no_grad()(lambda: model(ids, attention_mask=mask).logits[mask.bool()]),
        "packed": packed,
        "generate": lambda: model.generate(ids, attention_mask=mask, **options),
        "gradients": gradients,
        "GPT-2": torch.no_grad()(lambda: gpt2(ids).logits),
    }


if __name__ == "__main__":
    main()
