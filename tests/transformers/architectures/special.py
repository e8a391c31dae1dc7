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

#: (major version, pattern of "package:Class") -> why FlashAttention 2 gives something else than eager attention, or
#: fails, by the library's own code: what it hands to `flash_attn`, on any device.
EXPLAINED = {
    ("5", "aimv2:.*Text|aimv2:Aimv2Model"): "hands is_causal=False with a causal mask (modeling_aimv2.py:314)",
    ("4", "aimv2:.*Text|aimv2:Aimv2Model"): "hands is_causal=False with a causal mask (modeling_aimv2.py:283)",
    ("5", "videoprism:VideoPrism(Text|Clip)"): "is_causal is False with a causal mask (modeling_videoprism.py:365)",
    ("5", "moonshine:"): "is causal only without a mask (modeling_moonshine.py:327)",
    ("4", "moonshine:"): "is causal only without a mask (modeling_moonshine.py:271)",
    ("4", "gpt2:"): "is causal only without a mask (modeling_gpt2.py:333)",
    ("5", "pegasus_x:"): "is_causal is False in the decoder too (modeling_pegasus_x.py:164)",
    ("4", "pegasus_x:"): "is_causal is False in the decoder too (modeling_pegasus_x.py:177)",
    (
        "5",
        "phi4_multimodal:.*Vision",
    ): "is_causal is True in the image encoder, which sdpa follows too (modeling_phi4_multimodal.py:97)",
    (
        "4",
        "phi4_multimodal:.*Vision",
    ): "is_causal is True in the image encoder, which sdpa follows too (modeling_phi4_multimodal.py:100)",
    ("", "paligemma:|colpali:"): "the prompt's attention is bidirectional in the mask alone, while is_causal is True",
    (
        "",
        "t5gemma:",
    ): "the bidirectional encoder's window is one token smaller (modeling_flash_attention_utils.py)",
    (
        "4",
        "siglip2?:Siglip2?Text",
    ): "drops the mask of padding for FlashAttention (modeling_siglip.py:599, modeling_siglip2.py:679)",
    ("4", "modernbert:"): "converts to bfloat16 for FlashAttention (modeling_modernbert.py:361): rounding of bfloat16",
    (
        "4",
        "qwen2_moe:Qwen2Moe|phimoe:",
    ): "refuses padding on the right, and gives a window that its mask has not (modeling_qwen2_moe.py:460)",
    ("4", "gpt_neo:"): "takes the mask of FlashAttention for one of four dimensions (modeling_gpt_neo.py:314)",
    ("4", "bark:"): "its cache joins heads in place of tokens under FlashAttention (modeling_bark.py:235)",
    ("", "(csm):CsmForConditionalGeneration"): "its generation is not the same twice: sdpa differs by as much",
    ("", "mimi:MimiModel"): "gradients pass through a choice of codes; sdpa differs as well",
    ("", "esm:|mobilebert:"): "the pooler reads the first token, which left padding hides",
    (
        "5",
        "glm4v_moe:Glm4vMoeForConditionalGeneration",
    ): "packed: hands the positions of three axes to FlashAttention as if of one sequence",
}
