"""Features: what a call needs is data, a tier gets only what it names, and one rule says who computes gradients."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_mps import dispatch, tiers
from flash_attn_mps.frontends import fa2, fa2_private
from flash_attn_mps.problem import FEATURES, AttentionProblem
from tests.compiled import compiled
from tests.replaced_tiers import replace_tier

# What every tier honours; lengths_q and lengths_k repeat what tensors say.
BASIC = {
    "q",
    "k",
    "v",
    "batch",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "want_lse",
    "lengths_q",
    "lengths_k",
    "num_splits",
    "_features",
}
INDEX = torch.zeros(2, dtype=torch.int32)
# A value of each field that makes a call need its feature.
USED = {
    "window_left": 3,
    "window_right": 0,
    "attention_chunk": 4,
    "softcap": 2.0,
    "alibi_slopes": torch.ones(2),
    "dropout_p": 0.1,
    "want_probs": True,
    "cu_seqlens_q": INDEX,
    "cu_seqlens_k": INDEX,
    "seqused_q": INDEX,
    "seqused_k": INDEX,
    "block_table": INDEX[None],
    "kv_batch_idx": INDEX,
    "leftpad_k": INDEX,
    "k_descale": torch.ones(1, 2),
    "v_descale": torch.ones(1, 2),
    "mask": torch.ones(1, 2, 9, 9, dtype=torch.bool),
    "sinks": torch.zeros(2),
    "needs_grad": True,
    "forward_mode": True,
}


def problem(**fields) -> AttentionProblem:
    q = torch.randn(1, 9, 2, 16)
    return AttentionProblem(q, q, q, 1, 9, 9, fields.pop("softmax_scale", 0.25), **fields)


# Fields that say more about a feature that another field brings.
DETAILS = {"seed": "dropout", "max_seqlen_q_tensor": "varlen", "max_seqlen_k_tensor": "varlen"}


def test_every_field_is_basic_or_belongs_to_a_feature():
    """A new field fails here until it is one of these, and below until it makes a call need its feature."""
    names = {field.name for field in dataclasses.fields(AttentionProblem)}
    assert names == BASIC | USED.keys() | DETAILS.keys()


@pytest.mark.parametrize("name", USED)
def test_a_field_that_is_used_is_a_feature_of_the_call(name):
    (field,) = (f for f in dataclasses.fields(AttentionProblem) if f.name == name)
    assert len(problem(**{name: USED[name]}).features) == 1
    assert problem(**{name: field.default}).features == frozenset()


def test_every_feature_is_brought_by_a_field():
    brought = set().union(*(problem(**{name: value}).features for name, value in USED.items()))
    assert brought | {"scale_tensor"} == set(FEATURES)
    assert set(DETAILS.values()) <= brought


def test_codes_are_a_feature_without_a_descale_too():
    p = problem()
    p.k = p.v = p.k.to(torch.int8)
    assert p.features == {"quantised"}


def test_features_are_what_the_call_comes_to():
    assert problem(window_left=8).features == frozenset()  # hides nothing of 9 keys
    assert problem(window_left=2, window_right=0).features == {"window"}
    assert problem(softmax_scale=torch.tensor(0.2)).features == {"scale_tensor"}
    assert problem(softcap=1, mask=USED["mask"]).features == {"softcap", "mask"}


@pytest.mark.parametrize("tier", tiers.BY_NAME.values(), ids=lambda tier: tier.name)
def test_a_tier_is_not_given_what_it_does_not_name(tier):
    assert tier.serves <= set(FEATURES)
    for name, value in USED.items():
        p = problem(**{name: value})
        (feature,) = p.features
        refused = f"does not support {feature}" in tier.unsupported_reasons(p)
        assert refused == (feature not in tier.serves)
        if tier.backward is not None:
            reasons = tier.unsupported_backward_reasons(p, dlse=False, needed=frozenset("qkv"))
            refused = f"does not support {feature}" in reasons
            assert refused == (feature not in tier.serves_backward and feature != "probabilities")


def test_a_feature_that_nobody_names_is_refused(monkeypatch):
    """As a new one is, until a tier says that it honours it."""
    for name in ("simdgroup", "cpu", "torch"):
        tier = tiers.BY_NAME[name]
        replace_tier(monkeypatch, name, serves=tier.serves - {"softcap"})
    with pytest.raises(NotImplementedError, match="torch: does not support softcap"):
        dispatch.attention(problem(softcap=2.0))


def backward_eager(q, how):
    out = fa2.flash_attn_func(q, q, q, **how)
    return torch.autograd.grad(out.sum(), q)


def backward_in_a_graph(q, how):
    fast, _ = compiled(lambda q: fa2.flash_attn_func(q, q, q, **how))
    return torch.autograd.grad(fast(q).sum(), q)


def backward_private(q, how):
    q = q.detach()
    window = how.get("window_size", (-1, -1))
    rules = (0.0, 0.25, how.get("causal", False), *window, 0.0, None)
    out, lse, *_ = fa2_private._flash_attn_forward(q, q, q, *rules, False)
    fa2_private._flash_attn_backward(out, q, q, q, out, lse, *(torch.empty_like(q) for _ in range(3)), *rules, False)


@pytest.mark.parametrize("backward", [backward_eager, backward_in_a_graph, backward_private])
@pytest.mark.parametrize(
    ("how", "expected"), [({"causal": True}, "cpu"), ({"window_size": (3, 0)}, "torch")], ids=["causal", "window"]
)
def test_one_rule_says_who_computes_gradients(backward, how, expected, monkeypatch):
    asked = []

    def spy(tier):
        def backward(*arguments):
            asked.append(tier.name)
            return tier.backward(*arguments)

        return backward

    for name in ("cpu", "torch"):
        replace_tier(monkeypatch, name, backward=spy(tiers.BY_NAME[name]))
    backward(torch.randn(1, 9, 2, 16, requires_grad=True), how)
    assert asked == [expected]


def eager(q, k, v):
    fa2.flash_attn_func(q, k, v, softcap=2.0).sum().backward()


def in_a_graph(q, k, v):
    fast, _ = compiled(lambda q, k, v: fa2.flash_attn_func(q, k, v, softcap=2.0))
    fast(q, k, v).sum().backward()


def private(q, k, v):
    names = [t.requires_grad for t in (q, k, v)]
    q, k, v = (t.detach() for t in (q, k, v))
    rules = (0.0, 0.25, False, -1, -1, 2.0, None)
    out, lse, *_ = fa2_private._flash_attn_forward(q, k, v, *rules, False)
    buffers = [torch.empty_like(t) if needed else None for t, needed in zip((q, k, v), names, strict=True)]
    fa2_private._flash_attn_backward(out, q, k, v, out, lse, *buffers, *rules, False)


@pytest.mark.parametrize("names", ["q", "k", "v", "qv", "qkv"])
@pytest.mark.parametrize("backward", [eager, in_a_graph, private])
def test_a_tier_is_asked_for_what_somebody_needs(backward, names, monkeypatch):
    asked, computed = [], tiers.BY_NAME["torch"].backward

    def spy(*arguments):
        asked.append(arguments[-1])
        return computed(*arguments)

    replace_tier(monkeypatch, "torch", backward=spy)
    backward(*(torch.randn(1, 9, 2, 16).requires_grad_(name in names) for name in "qkv"))
    assert asked == [frozenset(names)]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("names", "products"), [("q", 3), ("k", 3), ("v", 2), ("qk", 4), ("kv", 4), ("qkv", 5)])
def test_what_nobody_needs_is_not_computed(names, products):
    p = problem(softcap=2.0, want_lse=True)
    result, dout = dispatch.attention(p), torch.randn(1, 9, 2, 16)
    every = tiers.gradients(p, result.out, result.lse, dout, None, frozenset("qkv"))
    with Products() as counted:
        some = tiers.gradients(p, result.out, result.lse, dout, None, frozenset(names))
    assert counted.count == products
    for name in ("q", "k", "v", "sinks", "mask"):
        gradient = getattr(some, f"d{name}")
        assert gradient is None if name not in names else torch.equal(gradient, getattr(every, f"d{name}"))


def test_explain_gradients_says_why_each_tier_does_not_compute_them():
    p = problem(window_left=3, window_right=0)
    assert tiers.explain_gradients(p) == {
        "simdgroup": ["tensors are on cpu"],
        "cpu": ["does not support window"],
        "torch": [],
    }
    assert "does not support lse_gradient" in dispatch.explain_gradients(problem(), dlse=True)["cpu"]


def test_a_forced_tier_computes_gradients_or_leaves_them_to_the_others(monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "torch")
    assert list(tiers.explain_gradients(problem())) == ["torch", "simdgroup", "cpu"]


def test_a_tier_that_turns_out_unable_leaves_gradients_to_the_next(monkeypatch):
    asked = []
    replace_tier(monkeypatch, "cpu", backward=lambda *_: asked.append("cpu"))
    q = torch.randn(1, 9, 2, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(fa2.flash_attn_func(q, q, q, causal=True).sum(), q)
    assert asked == ["cpu"]
    replace_tier(monkeypatch, "torch", backward=lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"cpu: its kernel does not work on this machine \| torch: its"):
        torch.autograd.grad(fa2.flash_attn_func(q, q, q, causal=True).sum(), q)
    assert expected.isfinite().all()
