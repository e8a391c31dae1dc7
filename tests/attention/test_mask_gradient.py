"""The gradient of an additive mask, a learned bias (Dao-AILab/flash-attention#617), summed where it is broadcast."""

import dataclasses
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flash_attn_mps import dispatch, flash_attention, tiers
from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.problem import AttentionProblem, with_mask, with_sinks
from flash_attn_mps.tiers import score_blocks
from tests.compiled import compiled

from . import oracle, philox
from .pairwise import case_id, pairwise
from .rule import assert_within_rule
from .test_autograd import CLEAR
from .test_memory import allocations

BATCH, HEADS, HEADS_K, SEQLEN_Q, SEQLEN_K, DIM = 2, 4, 2, 13, 18, 16
FULL = (BATCH, HEADS, SEQLEN_Q, SEQLEN_K)
# What may be broadcast, in every combination; and masks of fewer dimensions.
SHAPES = [tuple(1 if bits >> axis & 1 else n for axis, n in enumerate(FULL)) for bits in range(16)]
SHAPES += [(), (SEQLEN_K,), (SEQLEN_Q, 1), (SEQLEN_Q, SEQLEN_K), (HEADS, SEQLEN_Q, SEQLEN_K)]

CASES = pairwise(
    shape=SHAPES,
    dtype=(torch.float16, torch.bfloat16, torch.float32),
    same=(True, False),  # the mask's dtype: that of q, or float32
    rules=({}, {"causal": True}, {"window_size": (5, 3)}, {"softcap": 1.5}, {"causal": True, "softcap": 2.0}),
    hidden=(False, True),
    sinks=(False, True),
    dropout_p=(0.0, 0.3),
    lengths=(None, (13, 7)),  # keys of each sequence, where not all count
    blocks=(False, True),
    loss_of=("out", "lse"),
)


def reference(tensors, mask, case, keep):
    """Output and log-sum-exp by the oracle, in the dtype of `tensors`."""
    q, k, v, sinks = tensors
    done = []
    for b in range(BATCH):
        n = SEQLEN_K if case["lengths"] is None else case["lengths"][b]
        done.append(
            oracle.one_sequence(
                q[b],
                k[b, :n],
                v[b, :n],
                mask=mask.expand(FULL)[b, ..., :n],
                sinks=sinks if case["sinks"] else None,
                keep=None if keep is None else keep[b, ..., :n],
                dropout_p=case["dropout_p"],
                **case["rules"],
            )
        )
    out, lse, _ = zip(*done, strict=True)
    return torch.stack(out), torch.stack(lse)


def ours(tensors, mask, case):
    q, k, v, sinks = tensors
    options = CallOptions(want_lse=True, want_probs=False, dropout_p=case["dropout_p"], seed=77, **case["rules"])
    p = with_mask(dense(q, k, v, options), mask)
    if case["lengths"] is not None:
        p.seqused_k = torch.tensor(case["lengths"], dtype=torch.int32)
    result = dispatch.attention(with_sinks(p, sinks) if case["sinks"] else p)
    return result.out, result.lse


def gradients(function, tensors, mask, dtype, case, *more):
    cast = [x.to(dtype).detach().requires_grad_() for x in tensors]
    mask = mask.to(dtype if case["same"] or dtype == torch.float64 else torch.float32).detach().requires_grad_()
    out, lse = function(cast, mask, case, *more)
    weight = torch.linspace(-1.0, 1.0, out.numel()).view(out.shape)
    loss = (out.to(weight.dtype) * weight).sum()
    if case["loss_of"] == "lse":
        loss = loss + lse.masked_fill(lse == -math.inf, 0.0).square().sum()
    return torch.autograd.grad(loss, (*cast[:3], mask))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_oracle(case, monkeypatch):
    if case["blocks"]:  # of a few queries each
        monkeypatch.setattr(score_blocks, "SCORES", 5 * BATCH * HEADS * SEQLEN_K)
    dtype = case["dtype"]
    shapes = [(BATCH, SEQLEN_Q, HEADS, DIM), *[(BATCH, SEQLEN_K, HEADS_K, DIM)] * 2, (HEADS,)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    mask = torch.randn(case["shape"], dtype=dtype)
    if case["hidden"]:
        mask = mask.masked_fill(torch.rand(case["shape"]) < 0.2, -math.inf)
    keep = philox.keep(77, case["dropout_p"], *FULL) if case["dropout_p"] else None
    *mine, of_mask = gradients(ours, tensors, mask, dtype, case)
    *exact, exactly = gradients(reference, tensors, mask.expand(FULL), torch.float64, case, keep)
    *plain, plainly = gradients(reference, tensors, mask.expand(FULL), dtype, case, keep)
    for name, ours_, theirs, true in zip(("dq", "dk", "dv"), mine, plain, exact, strict=True):
        assert_within_rule(name, ours_, theirs, true)
    assert of_mask.shape == mask.shape
    assert of_mask.dtype == plainly.dtype
    # Where much is summed into few elements, the largest error of these is luck: that of what is summed is not.
    error = (plainly.double() - exactly).abs().max() * math.sqrt(math.prod(FULL) / mask.numel())
    assert (of_mask.double() - exactly.sum_to_size(mask.shape)).abs().max() <= 2 * error + 1e-5


def test_many_blocks_are_added_up_in_float32(monkeypatch):
    """A bias in half precision of keys that 600 queries see, two a block: it is rounded once, at the end."""
    monkeypatch.setattr(score_blocks, "SCORES", 2 * 20)
    q, k, v, do = (torch.randn(1, 1, n, 8, dtype=torch.float16) for n in (600, 20, 20, 600))
    bias = torch.zeros(1, 20, dtype=torch.float16, requires_grad=True)
    (mine,) = torch.autograd.grad(flash_attention(q, k, v, attn_mask=bias), bias, do)
    exact_bias = bias.detach().double().requires_grad_()
    p = (q[0, 0].double() @ k[0, 0].double().T / math.sqrt(8) + exact_bias).softmax(-1)
    (exact,) = torch.autograd.grad(p @ v[0, 0].double(), exact_bias, do[0, 0].double())
    assert (mine - exact).abs().max() <= 0.8 * torch.finfo(torch.float16).eps * exact.abs().max()


def small(*shape):
    return torch.randn(shape).requires_grad_()


@pytest.mark.parametrize("shape", [(9, 7), (2, 1, 7), (3, 1, 1, 7), (1, 1, 9, 1), (2, 9, 7)], ids=str)
def test_against_finite_differences(shape):
    """Along random directions: independent of the oracle's backward pass."""
    q, k, v = small(3, 2, 9, 8), small(3, 2, 7, 8), small(3, 2, 7, 8)
    bias = small(*shape)
    weight = torch.randn(3, 2, 9, 8)

    def value(bias):
        return (flash_attention(q, k, v, attn_mask=bias).double() * weight).sum()

    (gradient,) = torch.autograd.grad(value(bias), bias)
    for _ in range(3):
        direction, step = torch.randn_like(bias), 1e-2
        more, less = (value(bias.detach() + sign * step * direction).item() for sign in (1, -1))
        slope = (gradient * direction).sum().item()
        assert (more - less) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=2e-2)


def attend(q, k, v, bias):
    return flash_attention(q, k, v, attn_mask=bias)


def in_a_graph(q, k, v, bias):
    return compiled(attend)[0](q, k, v, bias)


def checkpointed(q, k, v, bias):
    return checkpoint(attend, q, k, v, bias, use_reentrant=False)


def checkpointed_reentrantly(q, k, v, bias):
    return checkpoint(attend, q, k, v, bias, use_reentrant=True)


def with_offloaded_tensors(q, k, v, bias):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        return attend(q, k, v, bias)


ROUTES = [attend, in_a_graph, checkpointed, checkpointed_reentrantly, with_offloaded_tensors]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("needed", ["bias", "all", "qkv"])
def test_routes(route, needed, monkeypatch):
    """The same gradients by every one; the tier is asked for those that are needed."""
    asked, backward = [], tiers.BY_NAME["torch"].backward

    def spy(*arguments):
        asked.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(tiers, "ORDER", tuple(_spied(tier, spy) for tier in tiers.ORDER))
    wanted = {"bias": {"mask"}, "all": {*"qkv", "mask"}, "qkv": {*"qkv"}}[needed]
    tensors = {**{name: small(2, 4, 9, 8) for name in "qkv"}, "mask": small(4, 9, 9)}
    results = []
    for function in (attend, route):
        leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in tensors.items()}
        function(*leaves.values()).square().sum().backward()
        results.append([x.grad for x in leaves.values()])
    assert asked == [frozenset(wanted)] * 2
    for mine, expected in zip(*results, strict=True):
        assert (mine is None) == (expected is None)
        assert mine is None or torch.equal(mine, expected)


def _spied(tier, spy):
    return dataclasses.replace(tier, backward=spy) if tier.name == "torch" else tier


def test_under_autocast_the_gradient_has_the_mask_s_dtype():
    q, bias = torch.randn(2, 2, 9, 8, dtype=torch.bfloat16), small(9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention(q, q, q, attn_mask=bias)
    out.float().square().sum().backward()
    assert bias.grad.dtype == torch.float32
    expected = bias.detach().clone().requires_grad_()
    flash_attention(q.float(), q.float(), q.float(), attn_mask=expected).square().sum().backward()
    torch.testing.assert_close(bias.grad, expected.grad, rtol=3e-2, atol=3e-2)


def test_what_hides_gets_no_gradient():
    """Neither -inf, nor rows that see nothing; NaN in what is hidden stays there."""
    q, k, v = small(1, 2, 5, 8), small(1, 2, 6, 8).detach(), small(1, 2, 6, 8).detach()
    bias = torch.zeros(5, 6)
    bias[:, 2] = bias[3] = -math.inf
    k[:, :, 2], v[:, :, 2] = math.nan, math.nan
    bias.requires_grad_()
    out = flash_attention(q, k, v, attn_mask=bias)
    (gradient,) = torch.autograd.grad(out.square().sum(), bias)
    assert out.isfinite().all()
    assert gradient.isfinite().all()
    assert not gradient[:, 2].any()
    assert not gradient[3].any()
    assert gradient[0, 0]


def test_an_expanded_bias_gets_the_sum_too():
    q, bias = small(2, 3, 6, 8), small(1, 3, 1, 6)
    one, two = (flash_attention(q, q, q, attn_mask=x) for x in (bias, bias.expand(2, 3, 6, 6)))
    of_one, of_two = (torch.autograd.grad(out.square().sum(), bias)[0] for out in (one, two))
    torch.testing.assert_close(of_one, of_two)


def test_a_second_derivative_is_refused():
    q, bias = small(1, 2, 6, 8), small(6, 6)
    (gradient,) = torch.autograd.grad(flash_attention(q, q, q, attn_mask=bias).square().sum(), bias, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match=CLEAR):
        gradient.sum().backward()


def test_a_tier_that_does_not_name_it_is_not_asked():
    q = torch.randn(1, 9, 2, 16)
    p = AttentionProblem(q, q, q, 1, 9, 9, 0.25, mask=torch.zeros(1, 1, 9, 9))
    for tier in tiers.BY_NAME.values():
        if tier.backward is not None:
            reasons = tier.unsupported_backward_reasons(p, False, frozenset({"mask"}))
            assert ("does not support mask_gradient" in reasons) == ("mask_gradient" not in tier.serves_backward)
    assert "mask_gradient" in tiers.BY_NAME["torch"].serves_backward


@pytest.mark.parametrize(("shape", "copies"), [((4, 1, 2048), 0), ((2048, 2048), 1), ((1, 2048, 1), 0)], ids=str)
def test_memory(shape, copies, tmp_path):
    """A gradient takes the memory of the mask, and blocks of scores: the scores of a call take 64 MiB for a head."""
    q, k, v = (torch.randn(1, 4, 2048, 32, requires_grad=True) for _ in range(3))
    bias = torch.zeros(shape, requires_grad=True)

    def call():
        torch.autograd.grad(flash_attention(q, k, v, attn_mask=bias).sum(), (q, k, v, bias))

    _, peak = allocations(call, tmp_path / "trace.json")
    without = torch.zeros(shape)

    def call_without():
        torch.autograd.grad(flash_attention(q, k, v, attn_mask=without).sum(), (q, k, v))

    _, least = allocations(call_without, tmp_path / "without.json")
    assert peak - least <= copies * 2048 * 2048 * 4 + (1 << 20)
