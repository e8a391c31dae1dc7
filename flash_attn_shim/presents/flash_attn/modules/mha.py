"""`flash_attn.modules.mha`: attention as modules, from scores to multi-head layers with an inference cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor, nn

from flash_attn import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules._cached_attention import CachedAttention
from flash_attn.ops.fused_dense import ColumnParallelLinear, RowParallelLinear
from flash_attn.utils.distributed import get_dim_for_local_rank

if TYPE_CHECKING:
    from flash_attn.utils.generation import InferenceParams


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of ALiBi (arXiv:2108.12409), a list of `nheads` floats: `2 ** (-8 i / nheads)` for a power of two.

    For other numbers, those of the next lower power of two, and then every other one of twice that.
    """
    n = 2 ** math.floor(math.log2(nheads))
    slopes = [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / n) for i in range(nheads - n)]


class FlashSelfAttention(nn.Module):
    """Attention of a packed qkv through `flash_attn_qkvpacked_func`, or its varlen form.

    Args:
        attention_dropout: probability of dropping an attention weight, in training.
        alibi_slopes: `(nheads,)` or `(batch, nheads)`.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self, qkv: Tensor, causal: bool | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Attend.

        Args:
            qkv: `(batch, seqlen, 3, nheads, head_dim)`, or `(total, 3, nheads, head_dim)` with `cu_seqlens` `(batch +
                1,)` int32 and `max_seqlen`.
            causal: overrides that of the module.

        Returns:
            `(batch, seqlen, nheads, head_dim)` or `(total, nheads, head_dim)`.
        """
        options = _flash_options(self, causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        lengths: Any = (cu_seqlens, max_seqlen)
        return flash_attn_varlen_qkvpacked_func(qkv, *lengths, **options)


class FlashCrossAttention(nn.Module):
    """`FlashSelfAttention` for q and a packed kv: `flash_attn_kvpacked_func`, or its varlen form."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: `(batch, seqlen_q, nheads, head_dim)`; with `cu_seqlens` and `max_seqlen`, `(total_q, nheads, head_dim)`.
            kv: `(batch, seqlen_k, 2, nheads_k, head_dim)`; with `cu_seqlens_k` and `max_seqlen_k`,
                `(total_k, 2, nheads_k, head_dim)`.
            causal: overrides that of the module.

        Returns:
            A tensor of the shape of `q`.
        """
        options = _flash_options(self, causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        lengths: Any = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)


class SelfAttention(nn.Module):
    """Attention of a packed qkv that makes the matrix of scores, in the dtype of `qkv`."""

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            qkv: `(batch, seqlen, 3, nheads, head_dim)`.
            causal: overrides that of the module.
            key_padding_mask: `(batch, seqlen)`, bool, True for keys to attend to.
        """
        q, k, v = qkv.unbind(dim=2)
        hidden = None
        if self.causal if causal is None else causal:
            seqlen = q.shape[1]
            hidden = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).triu(1)
        return _attention(self, q, k, v, key_padding_mask, hidden)


class CrossAttention(nn.Module):
    """Attention of q to a packed kv that makes the matrix of scores, in their dtype."""

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self, q: Tensor, kv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            q: `(batch, seqlen_q, nheads, head_dim)`.
            kv: `(batch, seqlen_k, 2, nheads_k, head_dim)`.
            causal: overrides that of the module; the last query sees the last key, or with a mask the last one it
                keeps.
            key_padding_mask: `(batch, seqlen_k)`, bool, True for keys to attend to; with `causal`, they come first.
        """
        if kv.shape[3] != q.shape[2]:
            kv = repeat(kv, "... hkv d -> ... (hkv g) d", g=q.shape[2] // kv.shape[3])
        k, v = kv.unbind(dim=2)
        hidden = None
        if self.causal if causal is None else causal:
            row = torch.arange(q.shape[1], device=q.device)[:, None]
            column = torch.arange(k.shape[1], device=q.device)
            kept = k.shape[1] if key_padding_mask is None else key_padding_mask.sum(-1)[:, None, None, None]
            hidden = column > row + kept - q.shape[1]
        return _attention(self, q, k, v, key_padding_mask, hidden)


def _flash_options(module, causal):
    slopes = module.alibi_slopes
    return {
        "dropout_p": module.drop.p if module.training else 0.0,
        "softmax_scale": module.softmax_scale,
        "causal": module.causal if causal is None else causal,
        "window_size": module.window_size,
        "alibi_slopes": None if slopes is None else slopes.float(),
        "deterministic": module.deterministic,
    }


def _attention(module, q, k, v, key_padding_mask, hidden):
    """Attention that adds -10000 to what is masked: a query that sees no key at all still gets a mean, as upstream."""
    softmax_scale = module.softmax_scale or q.shape[-1] ** -0.5
    scores = torch.einsum("bthd,bshd->bhts", q, k * softmax_scale)
    if key_padding_mask is not None:
        scores = scores + (~key_padding_mask)[:, None, None] * -10000.0
    if hidden is not None:
        scores = scores.masked_fill(hidden, -10000.0)
    attention = module.drop(torch.softmax(scores, dim=-1, dtype=v.dtype))
    return torch.einsum("bhts,bshd->bthd", attention, v)


class MHA(CachedAttention):
    """Multi-head attention: projections `Wqkv` (or `Wq` and `Wkv`), attention, projection `out_proj`.

    Args:
        num_heads_kv: fewer than `num_heads` for grouped or multi query attention; as many by default.
        cross_attn: project queries and keys apart, `Wq` and `Wkv`, from `x` and `x_kv`.
        layer_idx: the key of this layer's cache in `inference_params`.
        dwconv: a causal depthwise convolution of width three on the projections.
        rotary_emb_dim: rotary dimension; 0 for none. The `rotary_emb_...` are arguments of `RotaryEmbedding`.
        use_alibi, window_size: need `use_flash_attn`.
        fused_bias_fc: no effect, upstream neither.
        use_flash_attn: attend by `flash_attn_...` functions instead of making the matrix of scores.
        return_residual: return `(out, x)`.
        checkpointing: compute the attention again in the backward pass.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_heads_kv = _check_heads(embed_dim, num_heads, num_heads_kv)
        if rotary_emb_dim > 0 and cross_attn:
            raise NotImplementedError("rotary_emb_dim with cross_attn is not supported, upstream neither")
        if dwconv and cross_attn and num_heads_kv == num_heads:
            raise NotImplementedError("dwconv with cross_attn needs fewer num_heads_kv than num_heads, upstream too")
        self.embed_dim = embed_dim
        self.cross_attn = cross_attn
        self.causal = causal
        self.layer_idx = layer_idx
        self.dwconv = dwconv
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv
        self.head_dim = embed_dim // num_heads
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.head_dim * num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **factory)
        if dwconv:
            if num_heads_kv == num_heads:
                self.dwconv_qkv = _causal_conv(embed_dim + kv_dim, factory)
            else:
                self.dwconv_q = _causal_conv(embed_dim, factory)
                self.dwconv_kv = _causal_conv(kv_dim, factory)
        slopes = get_alibi_slopes(num_heads) if use_alibi else None
        options: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        self.inner_attn, self.inner_cross_attn = _inner(use_flash_attn, slopes, window_size, device, options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: `(batch, seqlen, embed_dim)`; with `cu_seqlens` and `max_seqlen`, `(total, embed_dim)`.
            x_kv: what keys and values come from, in cross attention; `x` by default.
            key_padding_mask: `(batch, seqlen)`, bool, True for keys to attend to; without `use_flash_attn` only.
            cu_seqlens, max_seqlen: bounds `(batch + 1,)` int32 and greatest length; with `use_flash_attn` only.
            mixer_subset: an index of the tokens of `x` that attend, in cross attention.
            inference_params: `flash_attn.utils.generation.InferenceParams`, to write to and attend to a cache.
            kwargs: go to the inner attention.
        """
        self._check_forward(x_kv, key_padding_mask, cu_seqlens, mixer_subset, inference_params)
        if self.use_flash_attn:
            kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        else:
            kwargs = {"key_padding_mask": key_padding_mask, **kwargs}
        if not self.cross_attn and self.num_heads_kv == self.num_heads:
            qkv = self.Wqkv(x)
            if self.dwconv:
                qkv = _convolve(self.dwconv_qkv, qkv)
            qkv = rearrange(qkv, "... (three h d) -> ... three h d", three=3, d=self.head_dim)
            context = self._attend_packed(qkv, inference_params, kwargs)
        else:
            if self.cross_attn:
                q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
                kv = self.Wkv(x if x_kv is None else x_kv)
            else:
                q, kv = self.Wqkv(x).tensor_split([self.embed_dim], dim=-1)
            if self.dwconv:
                q, kv = _convolve(self.dwconv_q, q), _convolve(self.dwconv_kv, kv)
            q = rearrange(q, "... (h d) -> ... h d", d=self.head_dim)
            kv = rearrange(kv, "... (two hkv d) -> ... two hkv d", two=2, d=self.head_dim)
            context = self._attend(q, kv, inference_params, kwargs)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _check_forward(self, x_kv, key_padding_mask, cu_seqlens, mixer_subset, inference_params) -> None:
        packed, masked = cu_seqlens is not None, key_padding_mask is not None
        cached = inference_params is not None
        for refused, message in (
            (packed and not self.use_flash_attn, "cu_seqlens needs use_flash_attn=True"),
            (packed and self.dwconv, "cu_seqlens with dwconv is not supported"),
            (packed and self.rotary_emb_dim > 0, "cu_seqlens with rotary_emb_dim is not supported"),
            (packed and masked, "cu_seqlens with key_padding_mask is not supported"),
            (masked and self.use_flash_attn, "key_padding_mask needs use_flash_attn=False"),
            (x_kv is not None and not self.cross_attn, "x_kv needs cross_attn=True"),
            (mixer_subset is not None and not self.cross_attn, "mixer_subset needs cross_attn=True"),
            (cached and self.dwconv, "inference_params with dwconv is not supported"),
            (cached and masked, "inference_params with key_padding_mask is not supported"),
            (cached and packed, "inference_params with cu_seqlens is not supported"),
        ):
            if refused:
                raise NotImplementedError(message)


class ParallelMHA(CachedAttention):
    """`MHA` of which each rank of a process group holds a part of the heads; see `MHA` for the other arguments.

    Args:
        sequence_parallel: each rank has a part of the tokens, the first axis of `x`; else all of them.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: dist.ProcessGroup,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_heads_kv = _check_heads(embed_dim, num_heads, num_heads_kv)
        self.embed_dim = embed_dim
        self.causal = causal
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.checkpointing = checkpointing
        self.process_group = process_group
        self.world_size = dist.get_world_size(process_group)
        self.local_rank = dist.get_rank(process_group)
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv
        # Heads go with the keys they read.
        group = num_heads // num_heads_kv
        heads_kv = [get_dim_for_local_rank(num_heads_kv, self.world_size, rank) for rank in range(self.world_size)]
        self.num_heads_kv_per_rank = heads_kv[self.local_rank]
        self.num_heads_per_rank = self.num_heads_kv_per_rank * group
        self.head_dim = embed_dim // num_heads
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        factory: dict[str, Any] = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.Wqkv = ColumnParallelLinear(
            embed_dim,
            self.head_dim * (num_heads + 2 * num_heads_kv),
            process_group,
            bias=qkv_proj_bias,
            multiple_of=self.head_dim * (group + 2),
            **factory,
        )
        first = sum(heads_kv[: self.local_rank]) * group
        slopes = get_alibi_slopes(num_heads)[first : first + self.num_heads_per_rank] if use_alibi else None
        options: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        self.inner_attn, self.inner_cross_attn = _inner(use_flash_attn, slopes, window_size, device, options)
        self.out_proj = RowParallelLinear(
            embed_dim, embed_dim, process_group, bias=out_proj_bias, multiple_of=self.head_dim * group, **factory
        )

    def forward(
        self, x: Tensor, seqlen: int | None = None, inference_params: InferenceParams | None = None, **kwargs: Any
    ) -> Tensor:
        """Attend.

        Args:
            x: `(batch, seqlen, embed_dim)`; with `seqlen`, `(batch * seqlen, embed_dim)`, of which with
                `sequence_parallel` each rank has a part.
            inference_params: as for `MHA`. kwargs: go to the inner attention.
        """
        qkv = self.Wqkv(x)
        if seqlen is not None:
            qkv = qkv.unflatten(0, (-1, seqlen))
        if self.num_heads_kv == self.num_heads:
            qkv = rearrange(qkv, "b s (three h d) -> b s three h d", three=3, d=self.head_dim)
            context = self._attend_packed(qkv, inference_params, kwargs)
        else:
            q, kv = qkv.tensor_split([self.num_heads_per_rank * self.head_dim], dim=-1)
            q = rearrange(q, "... (h d) -> ... h d", d=self.head_dim)
            kv = rearrange(kv, "... (two hkv d) -> ... two hkv d", two=2, d=self.head_dim)
            context = self._attend(q, kv, inference_params, kwargs)
        context = context.flatten(-2)
        return self.out_proj(context if seqlen is None else context.flatten(0, 1))


def _check_heads(embed_dim: int, num_heads: int, num_heads_kv: int | None) -> int:
    num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
    if num_heads % num_heads_kv:
        raise ValueError(f"num_heads must be divisible by num_heads_kv, got {num_heads} and {num_heads_kv}")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
    return num_heads_kv


def _inner(
    use_flash_attn: bool, alibi_slopes, window_size, device, options: dict[str, Any]
) -> tuple[nn.Module, nn.Module]:
    """The inner attention of a packed qkv, and of q and a packed kv."""
    if use_flash_attn:
        slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, device=device)
        options = {"alibi_slopes": slopes, "window_size": window_size, **options}
        return FlashSelfAttention(**options), FlashCrossAttention(**options)
    if alibi_slopes is not None:
        raise NotImplementedError("use_alibi needs use_flash_attn=True")
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError(f"window_size {window_size} needs use_flash_attn=True")
    return SelfAttention(**options), CrossAttention(**options)


def _causal_conv(channels: int, factory) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel_size=3, padding=2, groups=channels, **factory)


def _convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Convolve `(batch, seqlen, channels)` along the sequence. Without the last two outputs, it sees the past only."""
    return conv(x.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()
