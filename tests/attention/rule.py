"""The error rule, and the one harness that applies it to a call, forward and backward.

The rule is FlashAttention's own: against the fp64 oracle, the error may be at most twice that of a plain PyTorch
implementation in the dtype under test, plus 1e-5. It alone would let a tier compute its scores in bf16, so the
forward pass must also have accumulated in fp32: its error stays within the rounding of the probabilities and of the
output, and the log-sum-exp within fp32.
"""

import torch


def largest(error):
    return error.abs().max().item() if error.numel() else 0.0


def assert_within_rule(name, ours, plain, exact):
    """ours and plain: in the dtype under test; exact: float64, of the same shape."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == plain.dtype, f"{name}: dtype {ours.dtype}, expected {plain.dtype}"
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    error, allowed = largest(ours.double() - exact), 2 * largest(plain.double() - exact) + 1e-5
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_accumulated_in_fp32(out, exact, v, dropout_p=0.0):
    """The probabilities may be rounded to v's dtype once, and so may the output; nothing before them.

    For fp32 tensors the rule itself is that strict.
    """
    if v.dtype == torch.float32:
        return
    allowed = 2 * torch.finfo(v.dtype).eps * largest(v.double()) / (1.0 - dropout_p) + 1e-5
    assert largest(out.double() - exact) <= allowed, (
        f"out: error {largest(out.double() - exact):.3g}, fp32 accumulation {allowed:.3g}"
    )


def assert_lse(lse, exact):
    """lse: fp32, -inf exactly where the oracle's is."""
    assert lse.dtype == torch.float32
    assert lse.shape == exact.shape, f"softmax_lse: shape {tuple(lse.shape)}, expected {tuple(exact.shape)}"
    assert torch.equal(torch.isneginf(lse), torch.isneginf(exact)), "softmax_lse: -inf in the wrong rows"
    finite = torch.isfinite(exact)
    error = largest(lse.double()[finite] - exact[finite])
    allowed = 2e-5 * (1 + largest(exact[finite]))
    assert error <= allowed, f"softmax_lse: error {error:.3g}, allowed {allowed:.3g}"


def same_bits(a, b):
    """Equal, NaN included."""
    return torch.equal(torch.nan_to_num(a, nan=1.25), torch.nan_to_num(b, nan=1.25)) and torch.equal(
        a.isnan(), b.isnan()
    )


def verify(call, reference, tensors, *, dout=None, wanted=None, dropout_p=0.0):
    """Apply the rule to values and gradients of `call` on `tensors`, and return what call returned.

    tensors: name to tensor, the last of them v (or what holds it); their strides are kept.
    call: takes the tensors, gives out or a tuple that begins with (out, softmax_lse).
    reference: takes the tensors, gives an oracle result in their dtype.
    dout: makes the output's gradient from its shape and dtype; None for the forward pass only.
    wanted: names of the tensors that require a gradient, by default all.
    """
    wanted = [] if dout is None else list(tensors) if wanted is None else list(wanted)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    result = call(*leaves.values())
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)

    exact_leaves = {name: tensor.double().detach().requires_grad_(name in wanted) for name, tensor in before.items()}
    plain_leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in before.items()}
    exact, plain = reference(*exact_leaves.values()), reference(*plain_leaves.values())

    assert out.is_contiguous()
    assert_within_rule("out", out.detach(), plain.out.detach(), exact.out.detach())
    values = torch.nan_to_num(list(before.values())[-1])
    assert_accumulated_in_fp32(out.detach(), exact.out.detach(), values, dropout_p)
    if lse is not None:
        assert_lse(lse.detach(), exact.lse.detach())

    if wanted:
        gradient = dout(out.shape, out.dtype)
        untouched = gradient.clone()
        ours = torch.autograd.grad(out, [leaves[name] for name in wanted], gradient)
        assert torch.equal(gradient, untouched), "dout was changed"
        exact_grads = torch.autograd.grad(exact.out, [exact_leaves[name] for name in wanted], gradient.double())
        plain_grads = torch.autograd.grad(plain.out, [plain_leaves[name] for name in wanted], gradient)
        for name, mine, theirs, true in zip(wanted, ours, plain_grads, exact_grads, strict=True):
            assert_within_rule(f"d{name}", mine, theirs, true)

    for name, tensor in tensors.items():
        assert same_bits(tensor, before[name]), f"{name} was changed"
    return result
