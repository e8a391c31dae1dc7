"""What the generic way cannot know: values of configurations, by the model type that their class declares."""

from .shrink import HEADS, HIDDEN, VOCABULARY

_LOCAL_AND_GLOBAL = {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]}
_ATTENTION_SECOND = ["mamba", "attention"]
_IMAGE_TOKEN = {"vocabulary_map": {"<image>": VOCABULARY - 1}}

#: model_type -> values over the shrunk ones (a dict goes into the part of that name).
CONFIGURATIONS = {
    "gpt_neo": {**_LOCAL_AND_GLOBAL, "num_layers": 2},
    "esmc": {"num_key_value_heads": HEADS},
    "xmod": {"default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": _ATTENTION_SECOND},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "chameleon": _IMAGE_TOKEN,
    "emu3": _IMAGE_TOKEN,
    "mobilebert": {"embedding_size": HIDDEN, "true_hidden_size": HIDDEN, "intra_bottleneck_size": HIDDEN},
    "shieldgemma2": {"yes_token_index": 3, "no_token_index": 4},
    "phimoe": {"sliding_window": None},  # the file does not hand a window to the attention
}

#: Pattern of "module:Class" -> why a class that differs or fails does so, read in the library's own code.
EXPLAINED = {}
