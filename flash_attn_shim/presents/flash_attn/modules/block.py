"""`flash_attn.modules.block`: transformer blocks that hand on the residual beside the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn


class StochasticDepth(nn.Module):
    """In training, zero a row with probability `p` and scale the others; `mode` "row" only.

    Upstream takes torchvision's class of this name, for this mode.
    """

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        if mode != "row":
            raise NotImplementedError(f"mode must be 'row', got {mode!r}")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be between 0 and 1, got {p}")
        self.p = p
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return torch.where(keep, x / (1.0 - self.p), 0.0) if self.p < 1.0 else torch.zeros_like(x)


class Block(nn.Module):
    """A mixer (attention) and an MLP, each with dropout, residual and norm.

    With `prenorm`, a block starts in the middle: dropout, add and norm of what the block before it left, then the
    mixer; again, then the MLP; it returns the hidden states and the residual. Otherwise: mixer, dropout, add, norm,
    MLP, dropout, add, norm.

    Args:
        mixer_cls, mlp_cls, norm_cls: make the parts from `dim`. An `nn.Identity` as MLP stands for no second half.
        drop_path1, drop_path2: probabilities of stochastic depth.
        fused_dropout_add_ln: dropout, add and norm in one function, for `nn.LayerNorm` and the `RMSNorm` of
            `flash_attn.ops.triton.layer_norm`.
        return_residual: mixer and MLP return `(out, residual)`.
        residual_in_fp32: keep the residual in fp32; with `prenorm` only.
        sequence_parallel, mark_shared_params: mark the norms' parameters for `flash_attn.utils.distributed`.
    """

    mixer: Any
    norm1: Any
    norm2: Any
    dropout1: Any
    dropout2: Any

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[..., nn.Module] | None = None,
        mlp_cls: Callable[..., nn.Module] | None = None,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout_cls: Callable[[float], nn.Module] = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise ValueError("residual_in_fp32 needs prenorm=True")
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1, mode="row")
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        if not isinstance(self.mlp, nn.Identity):
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2, mode="row")
            self.norm2 = norm_cls(dim)
        if fused_dropout_add_ln:
            _check_fused(self.norm1, self.dropout1)
        _mark(self, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_subset: Tensor | None = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the block on `hidden_states` and `residual`, `(batch, seqlen, dim)` each; without `prenorm` no residual.

        Args:
            mixer_subset: an index of the tokens that go on, for cross attention.
            mixer_kwargs: further arguments of the mixer.

        Returns:
            `(hidden_states, residual)` with `prenorm`, else the hidden states.
        """
        mixer_kwargs = dict(mixer_kwargs or {})
        has_mlp = not isinstance(self.mlp, nn.Identity)
        if self.prenorm:
            hidden_states, residual = self._add_norm(1, hidden_states, residual)
            if mixer_subset is not None:
                mixer_kwargs["mixer_subset"] = mixer_subset
            hidden_states = self.mixer(hidden_states, **mixer_kwargs)
            if mixer_subset is not None:
                residual = residual[:, mixer_subset]
            if has_mlp:
                hidden_states, residual = self._add_norm(2, hidden_states, residual)
                hidden_states = self.mlp(hidden_states)
            return hidden_states, residual
        if residual is not None:
            raise ValueError("residual must be None without prenorm")
        hidden_states = self._post_norm(1, self.mixer, hidden_states, mixer_kwargs)
        return self._post_norm(2, self.mlp, hidden_states, {}) if has_mlp else hidden_states

    def _post_norm(self, which, layer, hidden_states, kwargs):
        out = layer(hidden_states, **kwargs)
        if self.return_residual:
            out, hidden_states = out
        return self._add_norm(which, out, hidden_states)[0]

    def _add_norm(self, which, hidden_states, residual):
        """Dropout, stochastic depth, add and norm, before (prenorm) or after the first or second half."""
        dropout = getattr(self, f"dropout{which}")
        drop_path = getattr(self, f"drop_path{which}")
        norm = getattr(self, f"norm{which}")
        if not self.fused_dropout_add_ln:
            return _add_norm(drop_path(dropout(hidden_states)), residual, norm, self.residual_in_fp32)
        rowscale = None
        if drop_path.p > 0.0 and self.training:
            rowscale = drop_path(hidden_states.new_ones(hidden_states.shape[:-1]))
        return layer_norm_fn(
            hidden_states,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            dropout_p=dropout.p if self.training else 0.0,
            rowscale=rowscale,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )


class ParallelBlock(nn.Module):
    """A mixer (attention) and an MLP beside each other, as in GPT-J, GPT-NeoX and PaLM; prenorm as in `Block`.

    Args:
        tied_norm: one norm for both.
    """

    mixer: Any
    norm1: Any
    norm2: Any
    dropout1: Any
    dropout2: Any

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[..., nn.Module] | None = None,
        mlp_cls: Callable[..., nn.Module] | None = None,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout_cls: Callable[[float], nn.Module] = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        if not tied_norm:
            self.norm2 = norm_cls(dim)
        if fused_dropout_add_ln:
            _check_fused(self.norm1, self.dropout1)
        _mark(self, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Tensor | None = None,
        residual: Tensor | None = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states1, hidden_states2: what the mixer and the MLP of the block before returned, or an embedding
                and None. residual: as for `Block`.
            mixer_kwargs: further arguments of the mixer.

        Returns:
            `(hidden_states1, hidden_states2, residual)`.
        """
        norm2 = self.norm1 if self.tied_norm else self.norm2
        if self.fused_dropout_add_ln:
            normed1, *normed2, residual = layer_norm_fn(
                hidden_states1,
                self.norm1.weight,
                self.norm1.bias,
                residual=residual,
                x1=hidden_states2,
                weight1=None if self.tied_norm else norm2.weight,
                bias1=None if self.tied_norm else norm2.bias,
                eps=self.norm1.eps,
                dropout_p=self.dropout1.p if self.training else 0.0,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=isinstance(self.norm1, RMSNorm),
            )
            normed2 = normed1 if self.tied_norm else normed2[0]
        else:
            total = self.dropout1(hidden_states1)
            if hidden_states2 is not None:
                total = total + self.dropout2(hidden_states2)
            normed1, new_residual = _add_norm(total, residual, self.norm1, self.residual_in_fp32)
            normed2 = normed1 if self.tied_norm else _add_norm(total, residual, norm2, False)[0]
            residual = new_residual
        return self.mixer(normed1, **(mixer_kwargs or {})), self.mlp(normed2), residual


def _add_norm(x, residual, norm, residual_in_fp32) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    normed = norm(total.to(norm.weight.dtype))
    return normed, total.float() if residual_in_fp32 else total


def _check_fused(norm, dropout) -> None:
    if not isinstance(norm, (nn.LayerNorm, RMSNorm)) or not isinstance(dropout, nn.Dropout):
        raise NotImplementedError(
            "fused_dropout_add_ln needs nn.LayerNorm or flash_attn.ops.triton.layer_norm.RMSNorm, and nn.Dropout; "
            f"got {type(norm).__name__} and {type(dropout).__name__}"
        )


def _mark(block, sequence_parallel: bool, mark_shared_params: bool) -> None:
    for name, parameter in block.named_parameters():
        if name.startswith(("norm1.", "norm2.")):
            if sequence_parallel:
                parameter._sequence_parallel = True
            if mark_shared_params:
                parameter._shared_params = True
