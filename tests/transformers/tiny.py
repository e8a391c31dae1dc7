"""Tiny models with random weights, and what they compute with one attention and another. Run as a program; prints JSON.

    python tiny.py flash_attention_2 [model ...]

For each model and case: the largest difference from "eager" relative to the largest value, at tokens that are not
padding; for "generate", how many tokens differ. Besides, how many calls `flash_attn_mps` served.
"""

import json
import sys
import tempfile
import traceback

import torch
import transformers

import flash_attn_shim
from flash_attn_mps import trace

MAJOR = int(transformers.__version__.partition(".")[0])
VOCABULARY, LENGTH = 64, 9

ENCODERS, CROSS = ("bert", "modernbert"), ("bart", "t5gemma", "t5gemma, window")
WINDOW = 4

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {**SIZES, "num_attention_heads": 4}
GROUPED = {**HEADS, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
# Weights so large that the scores matter: a wrong mask then shows in the first digit.
BIG = {"initializer_range": 0.3}


def t5gemma(layers):
    module = {
        "layer_types": layers,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        **GROUPED,
        **BIG,
    }
    modules = {"encoder": module, "decoder": module}
    config = transformers.AutoConfig.for_model("t5gemma", **modules, vocab_size=VOCABULARY, pad_token_id=0)
    config.bos_token_id = config.decoder.bos_token_id = config.decoder_start_token_id = 2
    return config


def bart():
    return transformers.AutoConfig.for_model(
        "bart",
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        init_std=0.3,
        pad_token_id=0,
        forced_eos_token_id=None,
    )


def qwen2_vl():
    text = {**GROUPED, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, **BIG}
    del text["head_dim"], text["pad_token_id"]
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 2, "mlp_ratio": 2}
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    if MAJOR < 5:
        return transformers.AutoConfig.for_model("qwen2_vl", **text, vision_config=vision, **tokens)
    return transformers.AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision, **tokens)


def of(model_type, **options):
    return lambda: transformers.AutoConfig.for_model(model_type, **{**options, **BIG})


FA2, MPS_FA = "flash_attention_2", "mps_fa"
EVERY = {(4, FA2), (4, MPS_FA), (5, FA2), (5, MPS_FA)}
SINCE_5 = {(5, FA2), (5, MPS_FA)}

#: name -> (makes the configuration, its class in transformers, (major version of transformers, attention) that it has)
MODELS = {
    "llama": (of("llama", **GROUPED), "AutoModelForCausalLM", EVERY),
    "mistral": (of("mistral", **GROUPED, sliding_window=WINDOW), "AutoModelForCausalLM", EVERY),
    "gemma2": (
        of("gemma2", **GROUPED, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
        "AutoModelForCausalLM",
        EVERY,
    ),
    "bert": (of("bert", **HEADS), "BertModel", SINCE_5),
    "modernbert": (
        of(
            "modernbert",
            **HEADS,
            local_attention=4,
            global_attn_every_n_layers=2,
            reference_compile=False,
            pad_token_id=0,
            bos_token_id=1,
            cls_token_id=1,
            eos_token_id=2,
            sep_token_id=2,
        ),
        "AutoModel",  # imports ModernBERT after main() has installed the shim: 4.57's asks at its import
        {(4, FA2), *SINCE_5},
    ),
    "qwen2_vl": (qwen2_vl, "Qwen2VLForConditionalGeneration", EVERY),
    "bart": (bart, "AutoModelForSeq2SeqLM", EVERY),
    "t5gemma": (lambda: t5gemma(["full_attention"] * 2), "AutoModelForSeq2SeqLM", SINCE_5),
    # With flash_attention_2, transformers gives this encoder a window that is one smaller than the one of "eager".
    "t5gemma, window": (lambda: t5gemma(["sliding_attention"] * 2), "AutoModelForSeq2SeqLM", {(5, MPS_FA)}),
}


def inputs_of(name, implementation):
    """case -> keyword arguments of the model: without a mask, and with padding on either side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY - 8, (2, LENGTH), generator=generator)
    left, right = torch.ones(2, LENGTH, dtype=torch.long), torch.ones(2, LENGTH, dtype=torch.long)
    left[0, :3], right[1, 6:] = 0, 0
    cases = {"prefill": {}, "padded left": {"attention_mask": left}, "padded right": {"attention_mask": right}}
    extra = {}
    if name == "qwen2_vl":
        # Two images of 4x4 patches, each merged to 4 tokens between the vision marks.
        ids[:, 3:9] = torch.tensor([62, 60, 60, 60, 60, 63])
        patches = torch.randn(2 * 16, 3 * 2 * 2 * 2, generator=generator)
        extra = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
        if MAJOR >= 5:
            extra["mm_token_type_ids"] = (ids == 60).int()
        del cases["padded right"]
    if name in CROSS:
        # For flash_attention_2 transformers takes the mask of the source for one of the target, which makes padded
        # queries of it: right for one query alone. mps_fa is tried with as many target as source tokens.
        length = 1 if implementation == FA2 else LENGTH
        extra = {"decoder_input_ids": torch.randint(3, VOCABULARY - 8, (2, length), generator=generator)}
    return {case: {"input_ids": ids, **masks, **extra} for case, masks in cases.items()}


def relative_difference(one, other, mask):
    keep = mask.bool() if mask is not None else torch.ones(one.shape[:2], dtype=torch.bool)
    return ((one - other)[keep].abs().max() / one[keep].abs().max()).item()


def make_pair(name, implementation):
    """The same weights with "eager" and with another attention, both loaded from files."""
    make, model_class = MODELS[name][0], getattr(transformers, MODELS[name][1])
    torch.manual_seed(0)
    from_config = getattr(model_class, "_from_config", None) or model_class.from_config
    model = from_config(make(), attn_implementation="eager")
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return [
            type(model).from_pretrained(directory, attn_implementation=attention).eval()
            for attention in ("eager", implementation)
        ]


@torch.no_grad()
def compare(name, implementation):
    pair = make_pair(name, implementation)
    assert pair[1].config._attn_implementation == implementation
    generates = hasattr(pair[0], "generate") and name not in ENCODERS
    differences = {}
    for case, keywords in inputs_of(name, implementation).items():
        mask = None if name in CROSS else keywords.get("attention_mask")
        expected, got = (model(**keywords)[0] for model in pair)
        differences[case] = relative_difference(expected, got, mask)
        if generates and case != "padded right":
            keywords = {key: value for key, value in keywords.items() if key != "decoder_input_ids"}
            options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            expected, got = (model.generate(**keywords, **options) for model in pair)
            differences[f"generate, {case}"] = (expected != got).sum().item()
    return differences


def main(implementation, names):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    trace.enable()
    if implementation == MPS_FA:
        from flash_attn_mps.integrations.transformers import register

        register()
    else:
        flash_attn_shim.install()
    results = {}
    for name in names:
        trace.calls.clear()
        try:
            results[name] = {"differences": compare(name, implementation), "calls": sum(trace.calls.values())}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or [name for name, model in MODELS.items() if (MAJOR, sys.argv[1]) in model[2]])
