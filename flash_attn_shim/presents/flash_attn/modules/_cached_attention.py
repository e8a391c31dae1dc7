"""Attention with a cache of keys and values: what `MHA` and `ParallelMHA` share.

The cache of a layer is one tensor `(max_batch_size, max_seqlen, 2, nheads_k, head_dim)` in `inference_params`
(`flash_attn.utils.generation.InferenceParams`), under the layer's `layer_idx`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn import flash_attn_with_kvcache

if TYPE_CHECKING:
    from flash_attn.utils.generation import InferenceParams


class CachedAttention(nn.Module):
    """Attention of projected q, k and v, with rotary embedding, and with a cache during inference."""

    num_heads_kv: int
    head_dim: int
    layer_idx: int | None
    use_flash_attn: bool
    checkpointing: bool
    rotary_emb_dim: int
    rotary_emb: Any
    inner_attn: Any
    inner_cross_attn: Any
    out_proj: Any

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty cache for this layer."""
        weight = self.out_proj.weight
        nheads = getattr(self, "num_heads_kv_per_rank", self.num_heads_kv)
        shape = (batch_size, max_seqlen, 2, nheads, self.head_dim)
        return torch.empty(shape, dtype=weight.dtype if dtype is None else dtype, device=weight.device)

    def _attend_packed(self, qkv, inference_params, kwargs):
        """Attention of `qkv` `(batch, seqlen, 3, nheads, head_dim)`; `kwargs` go to the inner attention."""
        if inference_params is not None:
            return self._attend(qkv[:, :, 0], qkv[:, :, 1:], inference_params, kwargs)
        if self.rotary_emb_dim > 0:
            qkv = self.rotary_emb(qkv)
        return self._run(self.inner_attn, qkv, **kwargs)

    def _attend(self, q, kv, inference_params, kwargs):
        """Attention of `q` `(batch, seqlen, nheads, head_dim)` to `kv` `(batch, seqlen_k, 2, nheads_k, head_dim)`."""
        if inference_params is None:
            if self.rotary_emb_dim > 0:
                q, kv = self.rotary_emb(q, kv)
            return self._run(self.inner_cross_attn, q, kv, **kwargs)
        if self.layer_idx is None:
            raise ValueError("layer_idx must be given to the constructor for inference_params, got None")
        lengths = inference_params.lengths_per_sample
        decoding = inference_params.seqlen_offset > 0
        if decoding and lengths is not None and not self.use_flash_attn:
            raise NotImplementedError("inference_params.lengths_per_sample needs use_flash_attn=True")
        fused = decoding and self.use_flash_attn
        rotary = {}
        if self.rotary_emb_dim > 0:
            if fused and self.rotary_emb.scale is None:
                rotary = self._rotary_tables(q, inference_params.max_seqlen)
            else:
                offset = inference_params.seqlen_offset if lengths is None else lengths
                q, kv = self.rotary_emb(q, kv, seqlen_offset=offset, max_seqlen=inference_params.max_seqlen)
        if fused:
            return self._attend_to_cache(q, kv, inference_params, rotary)
        return self.inner_cross_attn(q, update_kv_cache(kv, inference_params, self.layer_idx))

    def _rotary_tables(self, q, max_seqlen):
        self.rotary_emb._update_cos_sin_cache(max_seqlen, device=q.device, dtype=q.dtype)
        return {
            "rotary_cos": self.rotary_emb._cos_cached,
            "rotary_sin": self.rotary_emb._sin_cached,
            "rotary_interleaved": self.rotary_emb.interleaved,
        }

    def _attend_to_cache(self, q, kv, inference_params, rotary):
        """Rotate, append to the cache and attend to it, in one call."""
        start = inference_params.batch_size_offset
        samples = slice(start, start + q.shape[0])
        cache = inference_params.key_value_memory_dict[self.layer_idx][samples]
        lengths = inference_params.lengths_per_sample
        inner = self.inner_cross_attn
        return flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=inference_params.seqlen_offset if lengths is None else lengths[samples],
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            alibi_slopes=None if inner.alibi_slopes is None else inner.alibi_slopes.float(),
            **rotary,
        )

    def _run(self, inner, *args, **kwargs):
        if self.checkpointing:
            return checkpoint(inner, *args, use_reentrant=False, **kwargs)
        return inner(*args, **kwargs)


def update_kv_cache(kv: Tensor, inference_params: InferenceParams, layer_idx: int) -> Tensor:
    """Write `kv` `(batch, seqlen, 2, nheads, head_dim)` to the cache of a layer; the cache of these sequences so far.

    The cache is made where there is none.
    """
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        shape = (inference_params.max_batch_size, inference_params.max_seqlen, *kv.shape[2:])
        caches[layer_idx] = kv.new_empty(shape)
    cache = caches[layer_idx]
    batch_start, start = inference_params.batch_size_offset, inference_params.seqlen_offset
    batch_end, end = batch_start + kv.shape[0], start + kv.shape[1]
    if batch_end > cache.shape[0] or end > cache.shape[1]:
        raise ValueError(
            f"inference_params: the cache holds {cache.shape[0]} sequences of {cache.shape[1]} tokens, "
            f"but sequences up to {batch_end} and tokens up to {end} are to be written"
        )
    cache[batch_start:batch_end, start:end] = kv
    return cache[batch_start:batch_end, :end]
