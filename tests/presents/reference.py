"""Independent references in fp64 and the comparisons that the tests share."""

import torch

# One rounding of the result, and a little: fp32 arithmetic inside, whatever the dtype outside.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_close(actual, expected, dtype=None, scale=1.0):
    """`actual` equals the fp64 `expected` up to one rounding in `dtype` (that of `actual` by default)."""
    tolerance = scale * TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_rounded_once(actual, expected, noise=1e-6):
    """`actual` is the fp64 `expected` rounded to its dtype: half a unit in the last place, and fp32 noise inside."""
    half_ulp = torch.finfo(actual.dtype).eps / 2
    expected = expected.double()
    error = (actual.double() - expected).abs()
    assert (error <= (half_ulp * 1.01) * expected.abs() + noise).all(), f"error {error.max():.3g}"


def rotary(x, cos, sin, positions, interleaved=False, conjugate=False):
    """Rotate one sequence `(seqlen, nheads, head_dim)` pair by pair, as multiplication by `cos + i sin`."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    out = x.clone()
    half = cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turn = torch.complex(cos[positions, i], sin[positions, i])[:, None]
        if conjugate:
            turn = turn.conj()
        turned = torch.complex(x[..., a], x[..., b]) * turn
        out[..., a], out[..., b] = turned.real, turned.imag
    return out
