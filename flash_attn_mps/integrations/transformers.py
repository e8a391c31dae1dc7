"""transformers' own door for a new attention: `attn_implementation="mps_fa"` after `register()`. Nothing is patched.

    from flash_attn_mps.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mps_fa")

Tried with transformers 4.57.6 and 5.23.0. The name must not contain "flash": 5.x takes such a name for a kernel of
its own.
"""

import inspect

import torch

from .. import dispatch
from ..problem import Scoring, dense, varlen, with_sinks

NAME = "mps_fa"


def register() -> None:
    """Register the attention `mps_fa` and the masks that it takes with transformers. Calling it again is harmless."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size,
    kv_length,
    mask_function,
    attention_mask=None,
    q_length=None,
    q_offset=0,
    kv_offset=0,
    cache_position=None,
    **kwargs,
):
    """What a layer needs to know besides `is_causal` and `sliding_window`: a mask `(batch, keys)`, or None for nothing.

    A bool mask tells which keys are there. An integer mask tells which packed sequence each token belongs to, from
    1; 0 is padding. With a static cache it is shorter than `kv_length`: the keys behind it have not been written
    yet.

    Raises NotImplementedError for a `mask_function` that `causal`, `window_size` and lengths cannot express (chunked
    attention, bidirectional blocks for images, a caller's own).
    """
    patterns, sequences = _read(mask_function)
    if sequences is not None and bool((sequences[:, -1] != 0).any()):
        return sequences + 1
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        is_whole = attention_mask.shape[1] == kv_length and bool(attention_mask.all())
        return None if is_whole else attention_mask.bool()
    if "causal_mask_function" not in patterns:
        return None
    # 4.x passes the positions of the queries, 5.x their number and the first one.
    end = int(cache_position[-1]) + 1 if cache_position is not None else int(q_offset) + q_length
    written = end - kv_offset
    if written >= kv_length:
        return None
    device = cache_position.device if cache_position is not None else kwargs.get("device")
    return torch.ones(batch_size, written, dtype=torch.bool, device=device)


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    s_aux=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    **kwargs,
):
    """One layer's attention, as transformers calls it.

    query `(batch, heads, seqlen_q, head_dim)`, key and value `(batch, heads_k, seqlen_k, head_dim)`;
    `attention_mask` as `mask` returns it, or `(batch, 1, seqlen_q, seqlen_k)` as long as it says no more than
    padding and causality. `sliding_window` is the number of tokens that a causal query sees, itself included; else
    it reaches `sliding_window - 1` to both sides. `s_aux` `(heads,)` are attention sinks: a score, not scaled, that
    every query of a head has besides its keys; gradients reach them. Returns `((batch, seqlen_q, heads, head_dim),
    None)`; padded queries give zeros.

    Raises NotImplementedError naming what else the model asks for (biases, attention weights, ...).
    """
    for name in ("head_mask", "position_bias", "cache", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(f"{name}: attention {NAME!r} cannot honour it; use attn_implementation='eager'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scoring = Scoring(
        softmax_scale=scaling,
        causal=causal,
        window_size=_window(module, causal, sliding_window),
        softcap=0.0 if softcap is None else softcap,
        dropout_p=dropout,
    )
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if attention_mask is not None and attention_mask.ndim == 4:
        attention_mask = _padding_of(attention_mask, causal)
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask, scoring, s_aux), None
    if cu_seq_lens_q is not None:
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        packed = varlen(*(tensor.flatten(0, 1) for tensor in (q, k, v)), *lengths, scoring)
        return _computed(packed, s_aux).unflatten(0, q.shape[:2]), None
    return _computed(dense(q, k, v, scoring), s_aux), None


def _computed(problem, s_aux):
    return dispatch.attention(problem if s_aux is None else with_sinks(problem, s_aux, "s_aux")).out


def _window(module, causal, sliding_window):
    if sliding_window is None:
        return (-1, -1)
    if causal:
        return (sliding_window - 1, 0)
    # What the model's own mask says. In 5.23 ModernBERT passes one more than that to the layer, T5Gemma does not.
    reach = getattr(module.config, "sliding_window", None)
    return (reach, reach) if reach is not None else (sliding_window - 1, sliding_window - 1)


def _padded(q, k, v, keep, scoring, s_aux):
    """Attention of the tokens that a mask `(batch, keys)` keeps, as one packed call; the others give zeros."""
    batch, seqlen_q = q.shape[:2]
    k, v = k[:, : keep.shape[1]], v[:, : keep.shape[1]]
    if scoring.causal or scoring.window_size != (-1, -1) or keep.dtype != torch.bool:
        if keep.shape[1] < seqlen_q:
            raise ValueError(f"attention_mask covers {keep.shape[1]} keys, fewer than the {seqlen_q} queries")
        keep_q = keep[:, keep.shape[1] - seqlen_q :]
    else:  # cross attention has this mask for the keys alone, and perhaps as many queries
        keep_q = keep.new_ones(batch, seqlen_q)
    rows_q, cu_seqlens_q = _pack(keep_q)
    rows_k, cu_seqlens_k = _pack(keep)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise NotImplementedError("attention_mask: packed sequences whose queries are not all there")
    problem = varlen(
        q.flatten(0, 1)[rows_q],
        k.flatten(0, 1)[rows_k],
        v.flatten(0, 1)[rows_k],
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_q.diff().max(),
        cu_seqlens_k.diff().max(),
        scoring,
    )
    packed = _computed(problem, s_aux)
    out = packed.new_zeros(batch * seqlen_q, *packed.shape[1:])
    return out.index_put((rows_q,), packed).unflatten(0, (batch, seqlen_q))


def _pack(keep):
    """Rows that a mask `(batch, tokens)` keeps, in order, and where each of their sequences begins and ends:
    cu_seqlens."""
    rows = keep.flatten().nonzero().squeeze(1)
    if keep.dtype == torch.bool:
        lengths = keep.sum(1)
    else:
        batch_index = torch.arange(len(keep), device=keep.device).unsqueeze(1).expand_as(keep)
        sequences = torch.stack((batch_index.flatten()[rows], keep.flatten()[rows]))
        lengths = sequences.unique_consecutive(dim=1, return_counts=True)[1]
    return rows, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _padding_of(mask, causal):
    """The mask `(batch, keys)` that a mask `(batch, 1, queries, keys)`, bool or additive, amounts to besides
    causality."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise NotImplementedError(
            f"attention_mask: {NAME!r} takes no bias on the scores; use attn_implementation='eager'"
        )
    keep = seen[:, 0].any(1)
    expected = keep[:, None, None]
    if causal:
        queries, keys = mask.shape[-2:]
        expected = expected & torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    # What a padded query sees does not matter: nobody looks at it.
    is_query = keep[:, None, -mask.shape[-2] :, None] if causal else seen.new_ones(1)
    if not bool(((seen == expected) | ~is_query).all()):
        raise NotImplementedError(
            f"attention_mask of shape {tuple(mask.shape)}: {NAME!r} takes a mask that says no more than padding"
            f"{' and causality' if causal else ''}, such as (batch, keys); use attn_implementation='eager'"
        )
    return keep


# Functions in transformers.masking_utils of which a mask may consist. Windows reach the layer as `sliding_window`.
_PATTERNS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
}


def _read(function):
    """(names of the patterns a mask function consists of, the packed sequences' numbers `(batch, tokens)` or None)."""
    maker = function.__qualname__.partition(".")[0]
    inside = inspect.getclosurevars(function).nonlocals
    if function.__module__ == "transformers.masking_utils":
        if maker in _PATTERNS:
            return {maker}, None
        if maker == "packed_sequence_mask_function":
            return set(), inside["packed_sequence_mask"]
        if maker == "remap_positions_for_packed_sequence":
            return _read(inside["mask_function"])
        if maker == "and_masks":
            parts = [_read(part) for part in inside["mask_functions"]]
            sequences = [part for _, part in parts if part is not None]
            return set().union(*(names for names, _ in parts)), sequences[0] if sequences else None
    raise NotImplementedError(
        f"the model's mask is made by {function.__module__}.{maker}, which attention {NAME!r} cannot express; it takes "
        "causal and bidirectional masks, sliding windows, padding and packed sequences"
    )
