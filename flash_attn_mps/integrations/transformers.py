"""`attn_implementation="mps_fa"` for transformers, through its registry of attention functions. Nothing is patched.

    from flash_attn_mps.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mps_fa")

Tested with transformers 4.57.6 and 5.23.0. The name must not contain "flash": 5.x takes such a name for one of its
own kernels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, dispatch
from ..describe import CallOptions, dense, varlen
from ..problem import with_mask, with_sinks

NAME = "mps_fa"

_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DIMS = "batch, heads, seqlen, head_dim"
# The arguments of `attention` that this package calls by other names.
_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "softmax_scale": "scaling",
    "dropout_p": "dropout",
    "cu_seqlens_q": "cu_seq_lens_q",
    "cu_seqlens_k": "cu_seq_lens_k",
    "max_seqlen_q": "max_length_q",
    "max_seqlen_k": "max_length_k",
}


def register() -> None:
    """Register the attention `mps_fa`, and the masks that it takes, with transformers. Idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What a layer needs to know besides `is_causal` and `sliding_window`: a mask `(batch, keys)`, or None for nothing.

    A bool mask tells which keys are there. An integer mask tells which packed sequence each token belongs to, from
    1; 0 is padding. With a static cache it is shorter than `kv_length`: the keys behind it have not been written
    yet.

    What these cannot express (chunked attention, image tokens that see each other, a caller's own `mask_function`) is
    transformers' mask for SDPA: bool, `(batch, 1, queries, keys)`. So is the mask of a graph, which cannot look at
    what is padding.
    """
    is_graph = torch.compiler.is_compiling()
    read = None if is_graph else _read(mask_function)
    if read is None:
        from transformers.masking_utils import sdpa_mask

        # 4.x passes the positions of the queries, 5.x their number and the first one.
        queries = {"q_length": q_length, "q_offset": q_offset}
        if cache_position is not None:
            queries = {"cache_position": cache_position}
        skips = {} if is_graph else {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **{**kwargs, **queries, **skips},
        )
    patterns, sequences = read
    if sequences is not None and bool((sequences[:, -1] != 0).any()):
        return sequences + 1
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        is_whole = attention_mask.shape[1] == kv_length and bool(attention_mask.all())
        return None if is_whole else attention_mask.bool()
    if "causal_mask_function" not in patterns:
        return None
    if cache_position is not None:
        end = int(cache_position[-1]) + 1
    else:
        assert q_length is not None  # 4.x passes the positions, 5.x the number
        end = int(q_offset) + q_length
    written = end - kv_offset
    if written >= kv_length:
        return None
    device = cache_position.device if cache_position is not None else kwargs.get("device")
    return torch.ones(batch_size, written, dtype=torch.bool, device=device)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it.

    query `(batch, heads, seqlen_q, head_dim)`, key and value `(batch, heads_k, seqlen_k, head_dim)`;
    `attention_mask` as `mask` returns it, or of four dimensions that broadcast to `(batch, heads, seqlen_q,
    seqlen_k)`, bool (False hides) or added to the scores. A mask of four dimensions is complete: `is_causal` and
    `sliding_window` are then ignored, as in transformers' SDPA attention. `sliding_window` is the number of tokens
    that a causal query sees, itself included; else it reaches `sliding_window - 1` to both sides. `s_aux` `(heads,)`
    are attention sinks: an extra, unscaled score for every query of a head, in addition to its keys; differentiable.
    `position_bias`, as T5 has it, is added to the scores; it broadcasts to `(batch, heads, seqlen_q, seqlen_k)`;
    differentiable.
    Returns `((batch, seqlen_q, heads, head_dim), None)`; queries that see nothing, such as padded ones, give zeros.

    Raises ValueError that names a malformed argument, NotImplementedError that names what is not supported (a mask of
    heads, attention weights, ...).
    """
    for name in ("head_mask", "cache", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(
                f"{name}: attention {NAME!r} does not support it; use attn_implementation='eager'"
            )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(tensor, name, _DIMS)
    if attention_mask is not None:
        checks.tensor_of_rank(attention_mask, "attention_mask", (2, 4), "batch, keys; or batch, heads, queries, keys")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    rules: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": 0.0 if softcap is None else softcap,
        "dropout_p": dropout,
    }
    if attention_mask is not None and attention_mask.ndim == 4:
        attention_mask = attention_mask[..., : k.shape[1]]  # a mask for a static cache may reach further
        problem = with_mask(dense(q, k, v, CallOptions(**rules), _NAMES), attention_mask, "attention_mask")
        return _computed(_with_bias(problem, position_bias), s_aux), None
    causal = getattr(module, "is_causal", True) if is_causal is None else checks.flag(is_causal, "is_causal")
    options = CallOptions(causal=causal, window_size=_window(module, causal, sliding_window), **rules)
    if position_bias is not None:
        if attention_mask is None and cu_seq_lens_q is not None:
            raise checks.unsupported("position_bias", position_bias, "None where cu_seq_lens_q packs sequences")
        problem = _dense_of_kept(q, k, v, attention_mask, options)
        return _computed(_with_bias(problem, position_bias), s_aux), None
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask, options, s_aux), None
    if cu_seq_lens_q is not None:
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        packed = varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *lengths, options, names=_NAMES)
        return _computed(packed, s_aux).unflatten(0, q.shape[:2]), None
    return _computed(dense(q, k, v, options, _NAMES), s_aux), None


def _computed(problem, s_aux):
    return dispatch.attention(problem if s_aux is None else with_sinks(problem, s_aux, "s_aux")).out


def _window(module, causal, sliding_window):
    if sliding_window is None:
        return (-1, -1)
    reach = max(checks.integer(sliding_window, "sliding_window", "None or a number of tokens"), 0) - 1
    if causal:
        return (reach, 0)
    # What the model's own mask says. In 5.23 ModernBERT passes one more than that to the layer, T5Gemma does not.
    of_mask = getattr(module.config, "sliding_window", None)
    return (reach, reach) if of_mask is None else (of_mask, of_mask)


def _with_bias(problem, position_bias):
    """`problem` with the bias on its scores, on top of its mask. -inf hides, as in a bool mask."""
    if position_bias is None:
        return problem
    checks.tensor(position_bias, "position_bias", "batch, heads, queries, keys", problem.q)
    bias = position_bias[..., : problem.max_seqlen_k]  # a bias for a static cache reaches further
    biased, mask = with_mask(problem, bias, "position_bias"), problem.mask
    if mask is None:
        return biased
    bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else (bias + mask).to(bias.dtype)
    return with_mask(problem, bias, "position_bias")


def _dense_of_kept(q, k, v, keep, options):
    """The problem of all tokens, in which those that a mask `(batch, keys)` keeps see no others; the others give zeros.

    As a packed batch is, but with a mask of scores, on which a bias can stand.
    """
    if keep is None:
        return dense(q, k, v, options, _NAMES)
    keep_q = _kept_queries(q, k, v, keep, options)
    k, v = k[:, : keep.shape[1]], v[:, : keep.shape[1]]
    seen = (keep_q[:, :, None] == keep[:, None]) & keep[:, None].bool()
    return with_mask(dense(q, k, v, options, _NAMES), seen[:, None], "attention_mask")


def _kept_queries(q, k, v, keep, options):
    """What a mask `(batch, keys)` says of the queries."""
    checks.qkv(q, k, v, (_DIMS, _DIMS), _NAMES)
    batch, seqlen_q = q.shape[:2]
    if k.shape[0] != batch:
        raise checks.malformed("key", k, f"a batch of {batch}, that of query")
    if keep.dtype not in _MASKS or keep.device != q.device or keep.shape[0] != batch or keep.shape[1] > k.shape[1]:
        accepted = f"a bool or integer mask ({batch}, keys) for at most {k.shape[1]} keys, on {q.device}"
        raise checks.malformed("attention_mask", keep, accepted)
    if options.causal or options.window_size != (-1, -1) or keep.dtype != torch.bool:
        if keep.shape[1] < seqlen_q:
            raise checks.malformed("attention_mask", keep, f"at least {seqlen_q} keys, one for each query")
        return keep[:, keep.shape[1] - seqlen_q :]
    # Cross attention has this mask for the keys alone, and perhaps as many queries.
    return keep.new_ones(batch, seqlen_q)


def _padded(q, k, v, keep, options, s_aux):
    """Attention of the tokens that a mask `(batch, keys)` keeps, as one packed call; the others give zeros."""
    keep_q = _kept_queries(q, k, v, keep, options)
    batch, seqlen_q = q.shape[:2]
    k, v = k[:, : keep.shape[1]], v[:, : keep.shape[1]]
    rows_q, cu_seqlens_q = _pack(keep_q)
    rows_k, cu_seqlens_k = _pack(keep)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise NotImplementedError(
            "attention_mask: packed sequences some of whose queries are missing are not supported"
        )
    problem = varlen(
        q.flatten(0, 1)[rows_q],
        k.flatten(0, 1)[rows_k],
        v.flatten(0, 1)[rows_k],
        cu_seqlens_q,
        cu_seqlens_k,
        _longest(cu_seqlens_q),
        _longest(cu_seqlens_k),
        options,
        names=_NAMES,
    )
    packed = _computed(problem, s_aux)
    out = packed.new_zeros(batch * seqlen_q, *packed.shape[1:])
    return out.index_put((rows_q,), packed).unflatten(0, (batch, seqlen_q))


def _longest(cu_seqlens):
    lengths = cu_seqlens.diff()
    return lengths.max() if lengths.numel() else 0


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


# Functions in transformers.masking_utils of which a mask may consist. Windows reach the layer as `sliding_window`.
_PATTERNS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
}


def _read(function):
    """(names of the patterns a mask function consists of, the packed sequences' numbers `(batch, tokens)` or None), or
    None if there is something else in it."""
    if function.__module__ != "transformers.masking_utils":
        return None
    maker = function.__qualname__.partition(".")[0]
    inside = inspect.getclosurevars(function).nonlocals
    if maker in _PATTERNS:
        return {maker}, None
    if maker == "packed_sequence_mask_function":
        return set(), inside["packed_sequence_mask"]
    if maker == "remap_positions_for_packed_sequence":
        return _read(inside["mask_function"])
    if maker != "and_masks":
        return None
    parts = [_read(part) for part in inside["mask_functions"]]
    if None in parts:
        return None
    sequences = [part for _, part in parts if part is not None]
    return set().union(*(names for names, _ in parts)), sequences[0] if sequences else None
