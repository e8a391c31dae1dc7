"""What the generic way cannot know: values of configurations, by the model type that their class declares."""

from .shrink import HEADS, HIDDEN, VOCABULARY

_LOCAL_AND_GLOBAL = {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]}
_ATTENTION_SECOND = ["mamba", "attention"]
_IMAGE_TOKEN = {"vocabulary_map": {"<image>": VOCABULARY - 1}}
_PLAIN_ROPE = {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.5] * 4,
    "intermediate_size": [96] * 4,
}
_RESNET = {  # the default is timm's
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_kwargs": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
}

#: model_type -> values over the shrunk ones (a dict goes into the part of that name).
CONFIGURATIONS = {
    "gpt_neo": {**_LOCAL_AND_GLOBAL, "num_layers": 2},
    "esmc": {"num_key_value_heads": HEADS},
    "xmod": {"default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": _ATTENTION_SECOND},
    # Whatever equals the padding token becomes a hidden token in the depth decoder's generation, which infers its mask
    # from the codes; the real model has a padding token that is no code.
    "csm": {"depth_decoder_config": {"pad_token_id": None}},
    "jamba": {
        "sliding_window": None,  # 4.57 gives a window to FlashAttention alone (modeling_jamba.py:452, 1237)
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "chameleon": _IMAGE_TOKEN,
    "mobilebert": {"embedding_size": HIDDEN, "true_hidden_size": HIDDEN, "intra_bottleneck_size": HIDDEN},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "emu3": {**_IMAGE_TOKEN, "vq_config": {"base_channels": 32}},
    "mllama": {"text_config": _PLAIN_ROPE},
    "mllama_text_model": _PLAIN_ROPE,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "detr": _RESNET,
    "conditional_detr": _RESNET,
    "deformable_detr": {**_RESNET, "num_feature_levels": 3},
    "table-transformer": _RESNET,
    "shieldgemma2": {"yes_token_index": 3, "no_token_index": 4},
}
