"""`flash_attn.layers.patch_embed`."""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from flash_attn.ops.fused_dense import FusedDense


class PatchEmbed(nn.Module):
    """An image cut into patches, each projected by one linear layer.

    Args:
        img_size, patch_size: an int, or (height, width).
        norm_layer: makes the norm after the projection from `embed_dim`; none by default.
        flatten: tokens `(batch, patches, embed_dim)`; else a grid `(batch, rows, columns, embed_dim)`.
        fused_bias_fc: project by `FusedDense`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten: bool = True,
        bias: bool = True,
        fused_bias_fc: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        self.grid_size = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten
        linear = FusedDense if fused_bias_fc and bias else nn.Linear
        self.proj = linear(in_chans * self.patch_size[0] * self.patch_size[1], embed_dim, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Patches of `x` `(batch, in_chans, height, width)`."""
        if x.shape[2:] != self.img_size:
            raise ValueError(f"x must be images of height and width {self.img_size}, got {tuple(x.shape[2:])}")
        p1, p2 = self.patch_size
        x = self.proj(rearrange(x, "b c (h p1) (w p2) -> b h w (c p1 p2)", p1=p1, p2=p2))
        return self.norm(x.flatten(1, 2) if self.flatten else x)
