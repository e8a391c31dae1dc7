"""A tiny configuration from the library's own configuration class, by the names of its values.

All hidden sizes become `HIDDEN`, all head dims `HEAD_DIM`, and so on, so that what must agree between parts of a model
agrees. A list with one entry a layer keeps as many entries as it takes to have every kind of layer once.
"""

import re

from transformers import PretrainedConfig

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 64, 4, 2, 16, 96, 128
LAYERS, EXPERTS, POSITIONS, WINDOW, IMAGE, PATCH, FRAMES = 2, 4, 64, 4, 32, 8, 64
SOFTCAP = 2.0

# What the constructor computes again, or what is no property of the architecture.
_DROPPED = {
    "transformers_version", "architectures", "id2label", "label2id", "stage_names", "out_features",
    "_out_features", "_attn_implementation_autoset", "torch_dtype", "dtype", "_name_or_path",
}  # fmt: skip


def _at_most(limit):
    return lambda value: min(value, limit)


def _unless_zero(size):
    return lambda value: size if value else value


#: Numbers of things: (names, size or function of the default); the first that matches counts.
_COUNTS = [
    (r"feat_extract_layers|^num_residual_layers|^num_feature_levels", lambda v: v),
    (r"(^|_)(vocab_size(_per_layer_input)?|vocabulary_size|num_embeds)$", _at_most(VOCABULARY)),
    (r"(per_tok|per_token|top_k|topk|moe_k)$", _at_most(2)),
    (r"(num|n)_?(local_|routed_|moe_)?experts$|^zero_expert_num$|^moe_num_experts$", _at_most(EXPERTS)),
    (r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$", _at_most(1)),
    (r"^(num_kv_shared_layers|num_nextn_predict_layers|num_mem_blocks|max_window_layers)$", _at_most(1)),
    (r"layers?$|^n_layer$|(^|_)depth$|num_blocks$|_num_layers$|num_transition_layers", _at_most(LAYERS)),
    (r"^(max_position_embeddings|n_positions|max_sequence_length|max_seq_len|model_max_length|"
     r"max_2d_position_embeddings|"
     r"num_position_embeddings|max_seqlen|max_length|max_source_positions|max_target_positions|seq_length|"
     r"context_length|"
     r"original_max_position_embeddings|position_embedding_size|max_patches)$", _at_most(POSITIONS)),
]  # fmt: skip

#: Sizes of things, likewise.
_SIZES = [
    (r"^upsample_groups$", HIDDEN),
    (r"^(n_groups|mamba_n_groups|mamba_ngroups)$", _at_most(2)),
    (r"^(n_group|topk_group|num_expert_group|expert_group.*)$", 1),
    (r"^linear_num_(key|value)_heads$", HEADS),
    (r"^linear_(key|value)_head_dim$", HEAD_DIM),
    (r"^(mamba_n_heads|mamba_num_heads|linear_num_heads)$", HEADS),
    (r"^(mamba_d_head|mamba_head_dim|mamba_headdim)$", 2 * HIDDEN // HEADS),
    (r"^(mamba_d_ssm)$", 2 * HIDDEN),
    (r"^(mamba_d_state|ssm_state_size|mamba_dt_rank)$", 16),
    (r"^qk_(rope|nope)_head_dim$", HEAD_DIM // 2),
    (r"(head_dim|head_size|kv_channels|d_kv|v_head_dim)$", HEAD_DIM),
    (r"^rotary_dim$", HEAD_DIM // 2),
    (r"^(query_pre_attn_scalar)$", HEAD_DIM),
    (r"lora_rank$|^(laurel_rank|adapter_rank|embedding_rank)$", HIDDEN // 2),
    (r"(^|_)(heads|n_heads?|head|num_query_groups)$|num_.*_heads(_ipa)?$", lambda v: min(v, HEADS)),
    (r"intermediate_size$|ffn_dim$|mlp_dim$|ffn_hidden_size$|^d_ff$|^dff$|^n_inner$|"
     r"intermediate_dim$|feed_forward_.*size$",
     _unless_zero(INTERMEDIATE)),
    (r"hidden_size$|hidden_dim$|^d_model$|^n_embd$|embed_dim$|^dim$|embedding_size$|embedding_dim$|projection_dim$|"
     r"projection_size$|proj_dim$|output_dim$|pooler_output_size$|hid_dim$|_dim_model$|embd_dim$|decoder_dim$|"
     r"hidden_size_per_layer_input$|^adapter_in(put_size|_dim)$|^(emb_dim|lru_width|output_hidden_size|project_dim|condition_dim|output_size)$",
     _unless_zero(HIDDEN)),
    (r"^(sliding_window|attention_window_size|attention_chunk_size|local_window)$", WINDOW),
    (r"^(local_attention)$", 2 * WINDOW),
    (r"(^|_)image_size$|^crop_size$|^pretrain_image_size$", lambda v: IMAGE if v > IMAGE else v),
    (r"^(num_query_tokens|num_queries|resampler_n_latents|num_detection_tokens|num_latents|.*_num_latents(_2d)?)$",
     _at_most(8)),
    (r"^(max_num_patches|max_value_projector_patch_to_query_dict)$", 16),
    (r"^(image_seq_length|video_seq_length|num_image_tokens|mm_tokens_per_image|vision_soft_tokens_per_image)$",
     (IMAGE // PATCH) ** 2),
    (r"^patch_size$", lambda v: PATCH if v > 4 else v),
    (r"^(num_frames|frames_per_clip|tubelet_size)$", _at_most(4)),
]  # fmt: skip

#: What some models need and their configuration's default does not give.
_NOT_GIVEN = {
    "vocab_size": VOCABULARY,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "pad_token_id": 0,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}

#: The stages, or the layers, whose outputs a backbone gives to a neck, which has a part for each.
_BACKBONE_INDICES = ("out_indices", "_out_indices", "backbone_out_indices")

_COMMON = PretrainedConfig().to_dict()

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")

_OFF = re.compile(r"dropout|layerdrop|drop_path|drop_rate|pdrop|jitter|drop_prob|mask_time_prob|mask_feature_prob")
_STAGES = re.compile(r"^(stage_|stem_|depths$|hidden_sizes$|num_heads$|embed_dims?$|conv_|tdnn_|upsampl|.*channels$)")
_TOKEN = re.compile(r"(_token_id|_token_ids|_token_index|_token_idx|_id|_index|_ids)$")
_LAYER_INDEX = re.compile(r"index(es)?$|indices$|feature_layers?$|layer_ids?$|idxs?$|_layers$|^return_idx$")


#: How much is shrunk; the next is for what cannot be built, or run, so small.
EVERYTHING, COUNTS, NOTHING = "everything", "counts", "nothing"


class Shrinker:
    """Shrinks the values of one configuration. Token numbers that do not fit get new ones, the same in every part."""

    def __init__(self, level=EVERYTHING, windows=True):
        self.level, self.windows = level, windows
        self.rules = {EVERYTHING: [*_COUNTS, *_SIZES], COUNTS: _COUNTS, NOTHING: []}[level]
        self.tokens = {}

    def values(self, values, nested=False):
        """The values of a configuration, a dict as of `to_dict`, made small; `nested`: it is part of another."""
        values = {str(name): value for name, value in values.items()}
        layers = _number_of_layers(values)
        chosen = list(range(layers or 0)) if self.level == NOTHING else _chosen_layers(values, layers)
        small = {}
        for name, value in values.items():
            if name in _DROPPED or (nested and "vocab_size" not in values and _is_every_configuration_s(name, value)):
                continue
            small[name] = self._value(name, value, values, layers, chosen)
        for name in _LAYER_COUNTS:
            if layers and values.get(name) == layers:
                small[name] = len(chosen)
        if self.level == NOTHING:
            return small
        if self.level == EVERYTHING and values.get("qk_rope_head_dim") and "head_dim" in values:
            rotated = values["head_dim"] in (values["qk_rope_head_dim"], None)
            small["head_dim"] = HEAD_DIM // 2 if rotated else HEAD_DIM
        if small.get("use_sliding_window") is False:
            small["use_sliding_window"] = True
        if not self.windows and "sliding_window" in values:
            small["sliding_window"] = values["sliding_window"]
        elif "sliding_window" in small and small["sliding_window"] is None and "layer_types" not in small:
            small["sliding_window"] = WINDOW
        return small

    def _value(self, name, value, siblings, layers, chosen):
        if isinstance(value, dict):
            if layers and value and all(str(key).isdigit() for key in value):
                return {
                    to: self._of_layer(name, value[of], siblings)
                    for to, layer in enumerate(chosen)
                    for of in value
                    if int(of) == layer
                }
            if name in ("rope_parameters", "rope_scaling") or "rope_type" in value:
                return _rope(value) if self.level == EVERYTHING else value
            return self.values(value, nested=True)
        if value is None:
            return _NOT_GIVEN.get(name) if self.level == EVERYTHING else None
        if isinstance(value, (bool, str)):
            return value
        if _OFF.search(name) and isinstance(value, (int, float)):
            return 0.0 if isinstance(value, float) else 0
        if name.endswith("logit_softcapping") and isinstance(value, (int, float)):
            return SOFTCAP if "attn" in name else value
        if name == "conv_dim" and self.level == EVERYTHING:
            return [32] * len(value)
        if isinstance(value, int):
            return self._integer(name, value, siblings)
        if isinstance(value, (list, tuple)):
            return self._list(name, list(value), siblings, layers, chosen)
        return value

    def _of_layer(self, name, value, siblings):
        """What one layer has in place of what all have, where None says that it has none."""
        if not isinstance(value, dict):
            return self._value(name, value, siblings, None, None)
        small = {key: None if v is None else self._value(key, v, value, None, None) for key, v in value.items()}
        if small.get("sliding_window"):
            small["sliding_window"] = 2 * WINDOW
        return small

    def _integer(self, name, value, siblings):
        if self.level == NOTHING:
            return value
        if self.level == EVERYTHING and re.search(r"(key_value|kv).*heads|heads_kv", name) and value > 1:
            queries = [siblings.get(re.sub(r"key_value|kv", of, name)) for of in ("attention", "")]
            return HEADS if value in (*queries, siblings.get("num_heads"), siblings.get("n_head")) else KV_HEADS
        if _TOKEN.search(name) and value >= VOCABULARY - 32:
            return self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens))
        for pattern, size in self.rules:
            if re.search(pattern, name):
                return size(value) if callable(size) else size
        return value

    def _list(self, name, values, siblings, layers, chosen):
        if name == "decoder_in_channels" and self.level == EVERYTHING:
            return [HIDDEN] * len(values)
        if self.level == NOTHING or (_STAGES.search(name) and name != "conv_dim"):
            return values
        if name in _BACKBONE_INDICES:
            return _last_stages(values, len(chosen), layers)
        flags = set(map(str, values)) <= {"0", "1"}
        if layers and len(values) == layers and (flags or not _LAYER_INDEX.search(name)):
            return [self._value(name[:-1], values[i], siblings, None, None) for i in chosen]
        if values and all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            if (_LAYER_INDEX.search(name) and not _TOKEN.search(name.removesuffix("es"))) or name.endswith("indexes"):
                count = len(chosen) if chosen else LAYERS
                return sorted({min(v, count - 1) for v in values})
            if _TOKEN.search(name):
                return [self._integer(name, v, siblings) for v in values]
            if name in ("patch_size", "image_size"):
                return [self._integer(name, v, siblings) for v in values]
        return values


def _number_of_layers(values):
    return next((values[name] for name in _LAYER_COUNTS if isinstance(values.get(name), int)), None)


def _chosen_layers(values, layers):
    """Numbers of the layers to keep: two, or more if it takes more to have every kind of layer."""
    if not layers:
        return list(range(layers or 0))
    kinds = [
        v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == layers and not _STAGES.search(k)
    ]
    kinds += [
        [i in map(int, v) for i in range(layers)]
        for v in values.values()
        if isinstance(v, dict) and v and all(str(key).isdigit() for key in v)
    ]
    chosen, seen = [], set()
    for i in range(layers):
        kind = {(n, str(v[i])) for n, v in enumerate(kinds) if isinstance(v[i], (str, bool, int, type(None)))}
        if not kind <= seen:
            chosen.append(i)
            seen |= kind
        if len(chosen) == 6:
            break
    needed = max([LAYERS, *(len(values.get(name) or ()) for name in _BACKBONE_INDICES)])
    for i in range(layers):
        if len(chosen) >= min(needed, layers):
            break
        if i not in chosen:
            chosen.append(i)
    return sorted(chosen)


def _last_stages(indices, count, layers):
    """As many stages as a backbone gave; those of a backbone whose stages are not layers stay."""
    if len(indices) > count:
        return indices
    end = count + (max(indices, default=0) >= (layers or 0))  # some count the embedding as the first
    return list(range(end - len(indices), end))


def _is_every_configuration_s(name, value):
    """Is that a value which every configuration has? Some parts refuse to be given it."""
    return name in _COMMON and _COMMON[name] == value


def _rope(values):
    """RoPE's parameters for the small head dim; nested by kind of layer in some models."""
    small = {}
    for name, value in values.items():
        if isinstance(value, dict):
            small[name] = _rope(value)
        elif name == "mrope_section" or (name.endswith("_factor") and isinstance(value, (list, tuple))):
            half = int(HEAD_DIM * values.get("partial_rotary_factor", 1.0)) // 2
            small[name] = _sections(value, half) if name == "mrope_section" else list(value[:1]) * half
        elif name == "original_max_position_embeddings" and value:
            small[name] = POSITIONS // 2
        else:
            small[name] = value
    return small


def _sections(sections, total):
    """As many parts as before in about the same proportions, with the given sum."""
    exact = [total * part / sum(sections) for part in sections]
    small = [int(part) for part in exact]
    for i in sorted(range(len(small)), key=lambda i: small[i] - exact[i])[: total - sum(small)]:
        small[i] += 1
    return small


def tiny(default, source="", special=None, level=EVERYTHING):
    """A small configuration like the default one; `special` goes over the values found by name.

    `source`, the text of the modeling file, says whether its attention is given a window, and whether RoPE is in
    sections (M-RoPE), which default configurations do not always name.
    """
    values = Shrinker(level, "sliding_window=" in source).values(default.to_dict())
    if "mrope_section" in source and level == EVERYTHING:
        _give_sections(values, "rope_parameters[layer_type]" in source)
    return type(default).from_dict(_merged(values, special or {}))


def _give_sections(values, by_kind):
    """Give RoPE sections where there is text; `by_kind`: each kind of layer has a RoPE of its own."""
    for value in list(values.values()):
        if isinstance(value, dict):
            _give_sections(value, by_kind)
    if "num_hidden_layers" in values and "vocab_size" in values:
        name = "rope_parameters" if "rope_parameters" in values else "rope_scaling"
        rope = values.get(name) or {"rope_type": "default"}
        if any(isinstance(value, dict) for value in rope.values()):
            return  # each kind of layer has its own already
        partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0)
        rope.setdefault("mrope_section", _sections([16, 24, 24], int(HEAD_DIM * partial) // 2))
        values[name] = {kind: {"rope_theta": 10000.0, **rope} for kind in values["layer_types"]} if by_kind else rope


def _merged(values, over):
    """`over` over `values`, part by part.

    A part of another model type takes the place of the one that was there, as does one that is by numbers of layers.
    """
    merged = dict(values)
    for name, value in over.items():
        if isinstance(value, dict):
            before = values.get(name) or {}
            other = "model_type" in value and value["model_type"] != before.get("model_type")
            if other or all(isinstance(key, int) for key in value):
                before = {}
            value = _merged(before, value)
        merged[name] = value
    return merged
