"""Inputs of models that need more than values by the names of their arguments: name of a class -> maker of a feed."""

import torch

from . import shrink

FEEDS = {}


def feeds(*classes):
    """For models of these names; the function gets the model's `feed.Feeder`."""

    def register(function):
        FEEDS.update(dict.fromkeys(classes, function))
        return function

    return register


@feeds("Qwen2_5OmniToken2WavDiTModel")
def _denoised_mel(feeder):
    config, codes = feeder.config, feeder.ids(batch=1)
    frames = config.repeats * codes.shape[1]
    return {
        "hidden_states": feeder.random(len(codes), frames, config.mel_dim),
        "condition_vector": feeder.random(len(codes), shrink.FRAMES, config.mel_dim),
        "speaker_embedding": feeder.random(len(codes), frames, config.enc_emb_dim),
        "quantized_code": codes,
        "time_step": torch.tensor(0.5),
    }


@feeds("Qwen2_5OmniToken2WavModel")
def _codes_with_a_voice(feeder):
    config, codes = feeder.config.dit_config, feeder.ids(batch=1)
    return {
        "code": codes,
        "conditioning": feeder.random(1, config.enc_emb_dim),
        "reference_mel": feeder.random(1, shrink.FRAMES, config.mel_dim),
        "num_steps": 3,
    }


@feeds("Qwen2_5OmniToken2WavBigVGANModel")
def _mel(feeder):
    return {"mel_spectrogram": feeder.random(2, feeder.config.mel_dim, 8)}


@feeds("Molmo2Adapter")
def _features_of_patches(feeder):
    channels = feeder.config.hidden_size * len(feeder.config.vision_feature_layer)
    return {
        "image_features": feeder.random(1, 16, channels),
        "pooled_patches_idx": torch.arange(16).view(4, 4).masked_fill(torch.eye(4).bool(), -1),
    }


@feeds("FunAsrNanoEncoder")
def _stacked_frames(feeder):
    return {
        "input_features": feeder.random(2, 32, feeder.config.input_size),
        "input_features_mask": torch.ones(2, 32, dtype=torch.long),
    }


@feeds("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM")
def _keys_and_values_of_the_main_model(feeder):
    """It predicts the token after a prompt whose keys and values the main model's last layers computed."""
    keys = {}
    for name, module in feeder.model.named_modules():
        if name.endswith("self_attn"):
            heads, dim = module.config.num_attention_heads // module.num_key_value_groups, module.head_dim
            keys[module.layer_type] = tuple(feeder.random(2, heads, 10, dim) for _ in range(2))
    width = feeder.model.pre_projection.in_features
    return {
        "inputs_embeds": feeder.random(2, 1, width),
        "shared_kv_states": keys,
        "position_ids": torch.full((2, 1), 10),
    }


@feeds("MiniCPMOcrVisionModel", "MiniCPMV4_7VisionModel", "MiniCPMV4_6VisionModel")
def _patches_of_grids(feeder):
    size = feeder.config.patch_size
    return {
        "pixel_values": feeder.random(1, 3, size, 2 * 16 * size),
        "target_sizes": torch.tensor([[4, 4]] * 2, dtype=torch.int32),
    }


@feeds("MuseGlimmerAssistantModel")
def _tokens_to_denoise(feeder):
    feed = {name: feeder.value(name) for name in ("noise_embeds", "context_hidden_states")}
    return {**feed, "use_cache": True}


@feeds("NeuCodecModel", "Xcodec2Model")
def _speech_and_its_mel(feeder):
    frames = 16
    return {
        "input_values": feeder.random(1, 1, 320 * frames),
        "input_features": feeder.random(1, frames, 160),
    }


@feeds("PI0Model", "PI0ForConditionalGeneration")
def _images_and_a_state(feeder):
    config = feeder.config
    vlm, hidden = config.vlm_config, config.dit_config.hidden_size
    ids = feeder.ids()
    tokens = (vlm.vision_config.image_size // vlm.vision_config.patch_size) ** 2
    ids = torch.cat([torch.full((2, tokens), vlm.image_token_id), ids], 1)
    feed = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": feeder.random(2, 1, 3, vlm.vision_config.image_size, vlm.vision_config.image_size),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }
    if feeder.takes("state"):
        return {**feed, "state": feeder.random(2, config.max_state_dim), "timestep": torch.full((2,), 0.5)}
    return {**feed, "action_embeds": feeder.random(2, config.chunk_size + 1, hidden)}


@feeds("VisionTextDualEncoderModel")
def _image_and_text(feeder):
    return {"input_ids": feeder.ids(), "pixel_values": feeder.value("pixel_values")}


@feeds(
    "PPOCRV5MobileRecEncoderWithSVTR",
    "PPOCRV5ServerRecEncoderWithSVTR",
    "PPOCRV6SmallRecEncoderWithSVTR",
)
def _features_of_a_line(feeder):
    return {"hidden_states": feeder.random(2, next(feeder.model.parameters()).shape[1], 3, 24)}


@feeds("PeAudioVideoEncoder", "PeAudioVideoModel")
def _sound_and_frames(feeder):
    feed = {
        "input_values": feeder.random(2, 1, 16 * 1920),
        "pixel_values_videos": feeder.random(2, 4, 3, shrink.IMAGE, shrink.IMAGE),
    }
    return {"input_ids": feeder.ids(), **feed} if feeder.takes("input_ids") else feed


@feeds("EdgeTamVideoModel", "Sam2VideoModel", "Sam3TrackerVideoModel")
def _second_frame(feeder):
    """Of a video in whose first frame a point was marked; the model keeps what it remembers of that in a session."""
    size = shrink.IMAGE
    session = feeder.parameters["inference_session"].annotation(
        video=feeder.random(2, 3, size, size), video_height=size, video_width=size, dtype=torch.float32
    )
    one = session.obj_id_to_idx(1)
    point = {"point_coords": torch.full((1, 1, 1, 2), size / 2), "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)}
    session.add_point_inputs(one, 0, point)
    session.obj_with_new_inputs = [1]
    feeder.model(inference_session=session, frame_idx=0)
    return {"inference_session": session, "frame_idx": 1}


@feeds("SegformerModel", "SegformerForImageClassification", "SegformerForSemanticSegmentation")
def _image_of_more_than_one_key(feeder):
    """Its attention reads a key for 32 x 32 pixels."""
    return {"pixel_values": feeder.random(2, 3, 96, 96)}


@feeds("Dots3NoteAudioModel")
def _whole_chunks_of_sound(feeder):
    lengths = torch.full((2,), shrink.FRAMES * feeder.config.hop_length)
    return {
        "input_features": feeder.random(2, 128, shrink.FRAMES),
        "chunk_sample_lengths": lengths,
    }
