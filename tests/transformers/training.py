"""Twenty steps of transformers' Trainer over tiny models. Run as a program; prints JSON.

    python training.py model attention ...

The losses of each step, and how many backward passes `flash_attn_mps` computed on which tier. An attention is "eager",
or "torch" or "simdgroup": flash_attention_2 on that tier, the latter with its kernels on the Metal runner.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import tiny
import torch
import transformers
from transformers import Trainer, TrainingArguments

import flash_attn_shim
from flash_attn_mps import trace

STEPS, BATCH, LENGTH = 20, 4, 24


BERT = {**tiny.HEADS, "hidden_dropout_prob": 0.0}

#: name -> (makes the configuration, its class in transformers)
MODELS = {
    "llama": (tiny.of("llama", **tiny.GROUPED), "LlamaForCausalLM"),
    "llama, LoRA": (tiny.of("llama", **tiny.GROUPED), "LlamaForCausalLM"),
    "gemma2": (
        tiny.of(
            "gemma2", **tiny.GROUPED, sliding_window=tiny.WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
        ),
        "Gemma2ForCausalLM",
    ),
    "bert": (tiny.of("bert", **BERT, attention_probs_dropout_prob=0.0), "BertForMaskedLM"),
    "bert, dropout": (tiny.of("bert", **BERT, attention_probs_dropout_prob=0.2), "BertForMaskedLM"),
}


def examples():
    """Sentences of different lengths, padded: sequences that repeat, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS * BATCH):
        word = torch.randint(3, tiny.VOCABULARY, (5,), generator=generator)
        length = int(torch.randint(LENGTH // 2, LENGTH + 1, (), generator=generator))
        ids = word.repeat(LENGTH)[:LENGTH]
        mask = (torch.arange(LENGTH) < length).long()
        yield {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def make(name, attention):
    torch.manual_seed(0)
    configuration, model_class = MODELS[name]
    implementation = "eager" if attention == "eager" else "flash_attention_2"
    model = getattr(transformers, model_class)._from_config(configuration(), attn_implementation=implementation)
    if name.endswith("LoRA"):
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    return model


def losses(name, attention, directory):
    arguments = TrainingArguments(
        directory,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-2 if name.endswith("LoRA") else 3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    trainer = Trainer(model=make(name, attention), args=arguments, train_dataset=list(examples()))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def on(attention):
    """That tier serves what is called inside."""
    if attention == "simdgroup":
        sys.path.append(str(Path(__file__).resolve().parents[2]))
        from metal_host import observe
        from tests.metal_tiers import metal_on

        stack = contextlib.ExitStack()
        stack.enter_context(metal_on("cpu"))
        stack.enter_context(observe(instrumented=False))
        return stack
    return contextlib.nullcontext()


def main(names, attentions):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    trace.enable()
    flash_attn_shim.install()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            results[name] = {}
            for attention in attentions:
                trace.clear()
                os.environ["MTLFLASHATTN_KERNEL"] = "auto" if attention == "eager" else attention
                with on(attention):
                    found = losses(name, attention, directory)
                passes = {}
                for call, count in trace.gradients.items():
                    passes[call.tier] = passes.get(call.tier, 0) + count
                results[name][attention] = {"losses": found, "gradients": passes}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1].split(";"), sys.argv[2:])
