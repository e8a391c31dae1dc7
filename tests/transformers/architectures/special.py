"""What the generic way cannot know: values of configurations, by the model type that their class declares."""

from .shrink import EXPERTS, HEAD_DIM, HEADS, HIDDEN, IMAGE, INTERMEDIATE, PATCH, VOCABULARY

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
_BACKBONE = {  # the default is timm's, and ResNet refuses FlashAttention
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_kwargs": None,
    "backbone_config": {
        "model_type": "dinov2",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "out_indices": [2, 3, 4],
    },
}

_ERNIE_VL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}
_DIFFUSION_GEMMA = {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": INTERMEDIATE}
_DEEPSEEK_OCR2 = {"mlp_layer_types": ["dense", "sparse"]}
_EMBEDDING_GEMMA2 = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {1: {"head_dim": 2 * HEAD_DIM, "num_key_value_heads": 1}},
}
_SAM2 = {
    "vision_config": {
        "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
        "backbone_config": {"hidden_size": 96},
    },
    "prompt_encoder_config": {"patch_size": 2 * PATCH},
}
_SAM3 = {"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "backbone_config": {"window_size": 2}}}
_TWICE = 2 * HIDDEN  # pointers to objects are cut into pieces as wide as what is remembered of a frame, which is fixed
_MEMORY = {
    "image_size": IMAGE,
    "memory_attention_rope_feat_sizes": [2, 2],
    "memory_encoder_output_channels": HIDDEN,
    "memory_encoder_hidden_size": _TWICE,
    "memory_attention_hidden_size": _TWICE,
    "memory_fuser_embed_dim": _TWICE,
    "mask_downsampler_embed_dim": _TWICE,
    "mask_decoder_config": {"hidden_size": _TWICE},
}


def _with_memory(values):
    """Those of a model for images, for the one of its family that remembers the frames of a video."""
    return {
        **_MEMORY,
        "vision_config": {**values["vision_config"], "fpn_hidden_size": _TWICE},
        "prompt_encoder_config": {**values.get("prompt_encoder_config", {}), "hidden_size": _TWICE},
    }


_EDGETAM = {  # its default misspells "architecture", which gives a ResNet
    "backbone_config": {"architecture": "repvit_m1"},
    "backbone_feature_sizes": _SAM2["vision_config"]["backbone_feature_sizes"],
}
_TIMM_VIT = {"embed_dim": HIDDEN, "depth": 2, "num_heads": HEADS, "img_size": IMAGE, "patch_size": PATCH}
_PE_VIDEO = {"vision_config": {"model_args": _TIMM_VIT, "num_classes": HIDDEN}}
_PE_AUDIO = {"dac_config": {"encoder_hidden_size": 4, "hidden_size": HIDDEN}}
# Parts whose classes support FlashAttention 2 in every version.
_ENCODER = {"model_type": "distilbert"}
_DECODER = {"model_type": "bart", "is_decoder": True, "add_cross_attention": True, "is_encoder_decoder": False}
_MUSICGEN = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
}
_GEMMA4_VISION = {"vision_config": {"model_type": "gemma4_vision", "pooling_kernel_size": 2}}

#: model_type -> arguments without which the class gives no configuration.
GIVEN = {
    # Without parts for sounds, which refuse FlashAttention; an image of 4 by 4 patches becomes four tokens.
    "embedding_gemma2": _GEMMA4_VISION,
    "gemma4": _GEMMA4_VISION,
    "diffusion_gemma": _GEMMA4_VISION,
    "gemma4_unified": {
        "vision_config": {"model_type": "gemma4_unified_vision"},
        "audio_config": {"model_type": "gemma4_unified_audio"},
    },
    "encoder-decoder": {"encoder": _ENCODER, "decoder": _DECODER},
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2"}, "decoder": _DECODER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": _DECODER},
    "vision-text-dual-encoder": {
        "vision_config": {"model_type": "vit"},
        "text_config": {"model_type": "bert"},
    },
    "phi4_multimodal": {"vision_config": {}, "audio_config": {}},
    "rag": {"question_encoder": {"model_type": "dpr"}, "generator": {"model_type": "bart"}},
    "musicgen": {**_MUSICGEN, "decoder": {"model_type": "musicgen_decoder"}},
    "musicgen_melody": {**_MUSICGEN, "decoder": {"model_type": "musicgen_melody_decoder"}},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
}
_MINICPM = {"image_token_id": VOCABULARY - 1, "video_token_id": VOCABULARY - 2}
_OMNI = {"vision_start_token_id": VOCABULARY - 20}  # checkpoints have it in this part too, where it is read
_TILES = {"image_grid_pinpoints": [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]}  # of images cut into tiles

#: name of a model class -> name of its configuration's class, where its constructor names another.
CONFIGURATION_CLASSES = {
    "Emu3TextModel": "Emu3TextConfig",
}

#: model_type, or name of a model class -> values over the shrunk ones (a dict goes into the part of that name).
CONFIGURATIONS = {
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_omni_moe_thinker": _OMNI,
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "voxtral": {"audio_token_id": VOCABULARY - 1, "audio_config": {"intermediate_size": 4 * HIDDEN}},
    "glmasr": {"audio_config": {"intermediate_size": 4 * HIDDEN}},
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "minicpm_ocr": _MINICPM,
    "nemotron_h_omni": {**_MINICPM, "audio_token_id": VOCABULARY - 3},
    "gemma4_unified": {"vision_config": {"mm_embed_dim": HIDDEN, "output_proj_dims": HIDDEN}},
    "glm_image": {"vq_config": {"latent_channels": HIDDEN, "num_embeddings": 64}},
    "phi4_multimodal": {
        "audio_config": {
            "nemo_conv_channels": HIDDEN,
            "ext_pw_out_channel": HIDDEN,
            "depthwise_separable_out_channel": HIDDEN,
        }
    },
    "muse_glimmer": {"out_hidden_size": 4 * HIDDEN},
    "muse_spark": {"out_hidden_size": 4 * HIDDEN},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "ernie4_5_vl_moe": {"text_config": _ERNIE_VL},
    "ernie4_5_vl_moe_text": _ERNIE_VL,
    "diffusion_gemma": {"text_config": _DIFFUSION_GEMMA, "canvas_length": 8},
    "diffusion_gemma_text": _DIFFUSION_GEMMA,
    "deepseek_ocr2": {"text_config": _DEEPSEEK_OCR2},
    "deepseek_ocr2_text": _DEEPSEEK_OCR2,
    "embedding_gemma2": {"text_config": _EMBEDDING_GEMMA2},
    "embedding_gemma2_text": _EMBEDDING_GEMMA2,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "lw_detr": {
        "backbone_config": {"image_size": 2 * IMAGE},
        "projector_scale_factors": [1.0],
        "projector_in_channels": [HIDDEN],
        "num_feature_levels": 1,
        "projector_out_channels": HIDDEN,
    },
    # With a prefix it refuses FlashAttention 2, and names this value as the way out (configuration_hrm_text.py:136).
    "hrm_text": {"prefix_lm": False, "num_hidden_layers": 16, "num_layers_per_stack": 2},
    "kosmos-2": {"latent_query_num": 8},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": INTERMEDIATE},
    "sam2": _SAM2,
    "sam2_vision_model": _SAM2["vision_config"],
    "sam2_hiera_det_model": _SAM2["vision_config"]["backbone_config"],
    "edgetam": {"vision_config": _EDGETAM, "prompt_encoder_config": _SAM2["prompt_encoder_config"]},
    "edgetam_vision_model": _EDGETAM,
    "fast_vlm": {
        "vision_config": {"hidden_size": 256, "model_args": {"layers": [1] * 5, "embed_dims": [8, 16, 32, 64, 128]}}
    },
    "perception_lm": {
        "vision_config": {"architecture": "vit_pe_lang_large_patch14_448", "model_args": _TIMM_VIT},
    },
    "pe_audio_video": {"audio_video_config": {"audio_config": _PE_AUDIO, "video_config": _PE_VIDEO}},
    "pe_audio_video_encoder": {"audio_config": _PE_AUDIO, "video_config": _PE_VIDEO},
    "pe_video": {"video_config": _PE_VIDEO},
    "pe_video_encoder": _PE_VIDEO,
    "sam3_tracker": _SAM3,
    "sam3_tracker_video": {**_with_memory(_SAM3), "memory_attention_rope_feat_sizes": [4, 4]},
    "sam2_video": _with_memory(_SAM2),
    "edgetam_video": {
        **_with_memory(_SAM2),
        "memory_attention_rope_k_sizes": [2, 2],
        "perceiver_resampler_num_latents": 4,
        "perceiver_resampler_num_latents_2d": 4,
        "perceiver_resampler_attention_head_dim": HIDDEN,
    },
    "xcodec2": {"quantization_dim": 2 * HIDDEN},
    "neucodec": {"quantization_dim": 2 * HIDDEN},
    "muse_glimmer_assistant": {"sliding_window": 32},
    "pp_doclayout_v2": {
        "reading_order_config": {"max_2d_position_embeddings": 1024},
        "class_thresholds": [0.5] * 25,
        "class_order": list(range(25)),
    },
    "vibevoice": {"audio_config": {"num_filters": 2}, "semantic_model_config": {"num_filters": 2}},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": {"num_filters": 2},
        "semantic_tokenizer_encoder_config": {"num_filters": 2},
    },
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 3}},
    "qwen2_5_omni_token2wav": {"bigvgan_config": {"upsample_initial_channel": 64}},
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "Qwen3OmniMoeTalkerForConditionalGeneration": {
        "spatial_merge_size": 2,
        "text_config": {"shared_expert_intermediate_size": INTERMEDIATE},
    },
    "sapiens2": {
        "head_config": {
            "upsample_out_channels": [16, 16],
            "upsample_kernel_sizes": [4, 4],
            "conv_out_channels": [16],
            "conv_kernel_sizes": [1],
            "scale_conv_out_channels": [16],
            "scale_conv_kernel_sizes": [1],
            "scale_final_input_size": 64,
            "scale_final_hidden_sizes": [16, 16],
        }
    },
    "janus_vqgan": {"num_patches": 2},
    "lightglue": {"keypoint_detector_config": {"keypoint_decoder_dim": 65}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "2/4",
    },
    "instructblip": {"image_token_index": VOCABULARY - 1},
    "instructblipvideo": {"video_token_index": VOCABULARY - 1},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "zamba2": {"hybrid_layer_ids": [2], "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
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
    "gemma3n": {"text_config": _GEMMA3N, "vision_config": {"model_args": {"channel_multiplier": 0.1}}},
    "gemma3n_text": _GEMMA3N,
    "detr": _BACKBONE,
    "conditional_detr": _BACKBONE,
    "deformable_detr": {**_BACKBONE, "num_feature_levels": 3},
    "table-transformer": _BACKBONE,
    "chmv2": {"number_output_channels": 16},  # of 256 so many are near the kink of a ReLU that rounding takes some over
    "shieldgemma2": {"yes_token_index": 3, "no_token_index": 4},
}

#: name of a model class -> pattern of names of parameters -> what their random values are multiplied by.
SCALES = {
    # Random weights give a waveform of hundreds, which is clamped at 1: what is left is mostly rounding.
    "Qwen3OmniMoeCode2Wav": {r"decoder\..*conv\.weight": 0.3},
}

#: Model types of 4.57 whose cast of float32 for FlashAttention asks a part that has no weight for the dtype to cast to
#: (modeling_moshi.py:586). In half precision nothing is cast, and nothing where a quantized model names float32.
CASTS = ("moshi", "kyutai_speech_to_text")
