"""Tensors with the strides that callers hand over."""

import torch

LAYOUTS = ("contiguous", "transposed", "packed", "expanded", "offset", "strided_last")


def laid_out(x, layout):
    """x (..., S, H, D) with its values (expanded: with those of its first sequence or head) in the strides that
    `layout` names.
    """
    unused = float("nan") if x.is_floating_point() else 127  # a NaN in codes of 8 bits
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":  # (B, H, S, D) in memory
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "packed":  # the middle of a packed qkv projection, neighbours poisoned
        wide = torch.full((*x.shape[:-2], 3, *x.shape[-2:]), unused, dtype=x.dtype)
        wide[..., 1, :, :] = x
        return wide[..., 1, :, :]
    if layout == "expanded":  # stride 0, as `expand` gives it
        dim = 0 if x.dim() == 4 and x.shape[0] > 1 else x.dim() - 2
        return x.narrow(dim, 0, 1).clone().expand(x.shape) if x.shape[dim] else x
    if layout == "offset":  # neither the storage's begin nor aligned
        storage = torch.full((x.numel() + 3,), unused, dtype=x.dtype)
        storage[3:] = x.reshape(-1)
        return storage[3:].view(x.shape)
    if layout == "strided_last":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), unused, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    raise AssertionError(layout)


def random_dout(layout):
    """A maker of output gradients for rule.verify; "expanded" has all strides 0, as `out.sum().backward()` gives it.

    They are small. Where a query sees a single key, dp - delta is 0, and exactly so in plain PyTorch; FlashAttention
    takes delta from dout and out, and the fp32 rounding of its inner products must stay below the rule's 1e-5.
    """

    def make(shape, dtype):
        if layout == "expanded":
            return torch.full((), 1 / 16, dtype=dtype).expand(shape)
        return laid_out((torch.randn(shape) / 16).to(dtype), layout)

    return make


def randn(*shape, dtype, layout="contiguous"):
    return laid_out(torch.randn(*shape).to(dtype), layout)
