"""Long sequences on an NVIDIA GPU, by the public functions: `pytest -m metal_full --metal-device cuda tests/metal`.

Made to run under compute-sanitizer too. The reference is float64, on the same GPU, a block of queries at a time.
"""

import itertools

import pytest
import torch

import flash_attn_mps as fa
from flash_attn_mps import trace
from tests.metal_tiers import metal_on

pytestmark = pytest.mark.metal_full

CASES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (700, 100)},
    "causal, softcap, alibi": {"causal": True, "softcap": 20.0, "alibi_slopes": True},
}
SHAPES = [  # lengths of queries and of keys, heads, heads_k, head_dim, head_dim of v
    ([16384], [16384], 2, 1, 64, 64),
    ([4097], [16001], 2, 2, 128, 128),
    ([2048, 2048], [2048, 2048], 4, 2, 256, 256),
    ([1, 3000, 0, 517, 8192], [33, 2999, 70, 0, 8200], 2, 1, 96, 64),
    ([130, 0, 257], [200, 33, 257], 2, 1, 64, 64),  # small enough for racecheck and initcheck
]


@pytest.fixture
def on_gpu(request):
    if request.config.getoption("--metal-device") != "cuda":
        pytest.skip("needs --metal-device cuda: these lengths take hours on a CPU")
    with metal_on("cuda"):
        yield


def attention(q, k, v, options, dtype):
    """One sequence `(rows, heads, head_dim)`, in `dtype`, 512 queries at a time: the output and the log-sum-exp."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    offset, j = k.shape[1] - q.shape[0], torch.arange(k.shape[1], device=q.device)
    outs, lses = [], []
    for first in range(0, q.shape[0], 512):
        rows = q[first : first + 512].to(dtype).transpose(0, 1)
        i = torch.arange(first, first + rows.shape[1], device=q.device)[:, None] + offset
        s = rows @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if "softcap" in options:
            s = options["softcap"] * torch.tanh(s / options["softcap"])
        if "alibi_slopes" in options:
            s = s - options["alibi_slopes"].to(dtype)[:, None, None] * (i - j).abs()
        hidden = torch.zeros_like(i - j, dtype=torch.bool)
        hidden |= (j > i + right) if right >= 0 else hidden
        hidden |= (j < i - left) if left >= 0 else hidden
        s = s.masked_fill(hidden, -torch.inf)
        outs.append((torch.softmax(s, -1).nan_to_num(0.0) @ v).transpose(0, 1))
        lses.append(torch.logsumexp(s.double(), -1))
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_long(on_gpu, monkeypatch, dtype, shape, case):
    lengths_q, lengths_k, heads, heads_k, head_dim, head_dim_v = shape
    torch.manual_seed(0)
    options = dict(CASES[case])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(heads, device="cuda")
    q = torch.randn(sum(lengths_q), heads, head_dim, device="cuda", dtype=dtype)
    k = torch.randn(sum(lengths_k), heads_k, head_dim, device="cuda", dtype=dtype)
    v = torch.randn(sum(lengths_k), heads_k, head_dim_v, device="cuda", dtype=dtype)
    ends = [
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device="cuda") for n in (lengths_q, lengths_k)
    ]
    monkeypatch.setattr(trace, "enabled", True)
    trace.calls.clear()
    arguments = (q, k, v, *ends, max(lengths_q), max(lengths_k))
    out, lse, _ = fa.flash_attn_varlen_func(*arguments, return_attn_probs=True, **options)
    assert {call.tier for call in trace.calls} == {"simdgroup"}
    parts = list(zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True))
    for one, got, got_lse in zip(parts, out.split(lengths_q), lse.split(lengths_q, 1), strict=True):
        if one[0].shape[0] == 0:
            continue
        if one[1].shape[0] == 0:
            assert not got.any()
            assert (got_lse == -torch.inf).all()
            continue
        expected, expected_lse = attention(*one, options, torch.float64)
        plain, _ = attention(*one, options, dtype)
        error, plain_error = ((x.double() - expected).abs().max() for x in (got, plain))
        assert error <= 2 * plain_error + 1e-5
        torch.testing.assert_close(got_lse.double(), expected_lse, atol=2e-4, rtol=1e-5)
