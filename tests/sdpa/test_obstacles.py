"""Calls that stay torch's: bit for bit what torch gives, or the error that torch raises."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_mps import sdpa

ORIGINAL = F.scaled_dot_product_attention


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def same(a, b):
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


CPU = [
    {"shape": (2, 4, 33, 64)},
    {"shape": (4, 33, 64), "is_causal": True},
    {"shape": (33, 64)},
    {"shape": (2, 4, 33, 64), "attn_mask": torch.rand(33, 33) > 0.5},
    {"shape": (2, 4, 33, 40), "attn_mask": torch.randn(2, 1, 33, 33), "scale": 0.2},
    {"shape": (2, 4, 0, 64)},
    {"shape": (2, 4, 33, 64), "dropout_p": 0.3},
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("how", CPU)
def test_calls_on_the_cpu_are_torchs_bit_for_bit(how, dtype):
    how = {**how}
    q = randn(*how.pop("shape"), dtype=dtype)
    if (mask := how.get("attn_mask")) is not None and mask.is_floating_point():
        how["attn_mask"] = mask.to(dtype)
    leaves = [q.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(1)
    expected = ORIGINAL(leaves[0], leaves[0], leaves[0], **how)
    with sdpa.installed():
        torch.manual_seed(1)
        out = F.scaled_dot_product_attention(leaves[1], leaves[1], leaves[1], **how)
    assert same(out, expected)
    grads = [torch.autograd.grad(o.sum(), leaf)[0] for o, leaf in zip((expected, out), leaves, strict=True)]
    assert same(*grads)
    assert sdpa.stats() == {"taken": {}, "left": {}, "fell through": {}}, "no call comes here"


def test_every_way_to_pass_arguments():
    q, mask = randn(2, 4, 8, 16), torch.rand(8, 8) > 0.3
    with sdpa.installed():
        for args, kwargs in (
            ((q, q, q, mask, 0.0, False), {"scale": 0.5, "enable_gqa": False}),
            ((q, q), {"value": q, "attn_mask": mask}),
            ((), {"query": q, "key": q, "value": q, "is_causal": True}),
        ):
            assert same(F.scaled_dot_product_attention(*args, **kwargs), ORIGINAL(*args, **kwargs))


Q = randn(2, 4, 8, 16)
HALF = Q.half()
WRONG = {
    "nothing": ((), {}),
    "two": ((Q, Q), {}),
    "seven": ((Q, Q, Q, None, 0.0, False, 1.0), {}),
    "unknown": ((Q, Q, Q), {"causal": True}),
    "a list": (([1.0], Q, Q), {}),
    "None": ((Q, None, Q), {}),
    "dtypes": ((Q, HALF, Q), {}),
    "mask dtype": ((Q, Q, Q, torch.zeros(8, 8, dtype=torch.int64)), {}),
    "mask shape": ((Q, Q, Q, torch.zeros(3, 8, 8)), {}),
    "1-D mask": ((Q, Q, Q, torch.zeros(8)), {}),
    "is_causal": ((Q, Q, Q), {"is_causal": 1}),
    "scale": ((Q, Q, Q), {"scale": "a"}),
    "dropout_p": ((Q, Q, Q), {"dropout_p": 2.0}),
    "heads": ((Q, Q[:, :3], Q[:, :3]), {"enable_gqa": True}),
    "head dims": ((Q, Q[..., :5], Q), {}),
    "integers": ((Q.long(), Q.long(), Q.long()), {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise_what_torch_raises(as_mps, name, recwarn):
    args, kwargs = WRONG[name]
    with pytest.raises(Exception) as expected:
        ORIGINAL(*args, **kwargs)
    with sdpa.installed(), pytest.raises(type(expected.value)) as raised:
        F.scaled_dot_product_attention(*args, **kwargs)
    assert str(raised.value) == str(expected.value)
    assert not recwarn.list
    assert sdpa.stats()["taken"] == sdpa.stats()["fell through"] == {}


TORCHS = {  # arguments that torch computes itself, and the key of the reason
    "float64": ("dtype", (Q.double(), Q.double(), Q.double()), {}),
    "2-D": ("shape", (Q[0, 0], Q[0, 0], Q[0, 0]), {}),
    "other ranks": ("shape", (Q, Q[0], Q[0]), {}),
    "a batch of queries to expand": ("shape", (Q[:1], Q, Q), {}),
    "other heads of value": ("shape", (Q, Q[:, :2], Q), {"enable_gqa": True}),
    "empty queries": ("empty", (Q[:, :, :0], Q, Q), {}),
    "empty keys": ("empty", (Q, Q[:, :, :0], Q[:, :, :0]), {}),
    "empty values": ("empty", (Q, Q, Q[..., :0]), {}),
    "wide heads": ("head_dim", (randn(1, 1, 2, 520),) * 3, {}),
    "is_causal and a mask": ("mask", (Q, Q, Q, torch.zeros(8, 8)), {"is_causal": True}),
    "a mask that differs in 5-D": ("mask", (Q[None],) * 3 + (torch.zeros(1, 2, 4, 8, 8),), {}),
    "all dropped": ("dropout_p", (Q, Q, Q), {"dropout_p": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHS)
def test_what_only_torch_computes(as_mps, name):
    reason, args, kwargs = TORCHS[name]
    with sdpa.installed():
        out = F.scaled_dot_product_attention(*args, **kwargs)
    assert same(out, ORIGINAL(*args, **kwargs))
    assert sdpa.stats()["left"] == {reason: 1}
    assert sdpa.explain(*args, **kwargs).reasons[0].key == reason


def test_a_tensor_as_scale_is_a_number_by_the_time_it_comes_here(as_mps):
    with sdpa.installed():
        out, expected = (F.scaled_dot_product_attention(Q, Q, Q, scale=scale) for scale in (torch.tensor(0.5), 0.5))
    assert same(out, expected)
    assert sum(sdpa.stats()["taken"].values()) == 2
    assert sdpa.explain(Q, Q, Q, scale=torch.tensor(0.5)).reasons[0].key == "scale"


class Plain(torch.Tensor):
    pass


class Seen(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is ORIGINAL:
            self.seen = True
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = True
        return func(*args, **(kwargs or {}))


def attend(q):
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.mark.parametrize("backends", [SDPBackend.MATH, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]])
def test_an_explicit_choice_of_backends(as_mps, backends):
    with sdpa_kernel(backends):
        expected = attend(Q)
    with sdpa.installed(), sdpa_kernel(backends):
        assert same(attend(Q), expected)
        assert sdpa.stats()["left"] == {"sdpa_kernel": 1}
    with sdpa.installed():
        attend(Q)
    assert sum(sdpa.stats()["taken"].values()) == 1


def test_functorch(as_mps):
    def loss(q):
        return attend(q).square().sum()

    expected = torch.func.grad(loss)(Q), torch.func.vmap(attend)(Q)
    with sdpa.installed():
        assert torch.equal(torch.func.grad(loss)(Q), expected[0])
        assert torch.equal(torch.func.vmap(attend)(Q), expected[1])
    assert set(sdpa.stats()["left"]) == {"functorch"}
    assert sdpa.stats()["taken"] == {}


def test_forward_mode_differentiation(as_mps):
    with sdpa.installed(), torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = torch.autograd.forward_ad.make_dual(Q, torch.ones_like(Q))
        assert torch.autograd.forward_ad.unpack_dual(attend(dual)).tangent is not None
    assert sdpa.stats()["left"] == {"forward AD": 1}


def test_traces_and_scripts_hold_torchs_operator_and_are_served_when_they_run(as_mps):
    with sdpa.installed():
        traced = torch.jit.trace(attend, (Q,), check_trace=False)
        scripted = torch.jit.script(torch.nn.MultiheadAttention(16, 2))
        symbolic = torch.fx.symbolic_trace(attend)
        for graph in (traced.graph, scripted.inlined_graph):
            assert "aten::scaled_dot_product_attention" in str(graph)
            assert "mtlflashattn" not in str(graph)
        sdpa.reset()
        expected = attend(Q)
        for run in (traced, symbolic):
            assert torch.equal(run(Q), expected)
        with torch.no_grad():
            scripted(Q[0], Q[0], Q[0], need_weights=False)
    assert sum(sdpa.stats()["taken"].values()) == 4
    torch.testing.assert_close(traced(Q), expected)
    assert sum(sdpa.stats()["taken"].values()) == 4, "and torch's once it is uninstalled"


def test_modes_see_torchs_function(as_mps):
    with sdpa.installed():
        for mode in (Seen(), Dispatched()):
            with mode:
                attend(Q)
            assert mode.seen
    assert sdpa.stats()["left"] == {"mode": 1}
    assert sum(sdpa.stats()["taken"].values()) == 1, "what the function mode passes on, having seen it"


def test_a_default_device_is_no_obstacle(as_mps):
    """torch.set_default_device("mps") is a mode too, and common on a Mac."""
    with sdpa.installed(), torch.device("cpu"):
        attend(Q)
    assert sum(sdpa.stats()["taken"].values()) == 1


def test_subclasses_and_nested_tensors(as_mps):
    nested = torch.nested.nested_tensor([randn(5, 4, 16), randn(3, 4, 16)], layout=torch.jagged).transpose(1, 2)
    expected = ORIGINAL(nested, nested, nested)
    with sdpa.installed():
        out = F.scaled_dot_product_attention(nested, nested, nested)
        assert torch.equal(out.values(), expected.values())
        plain = Q.as_subclass(Plain)
        assert type(F.scaled_dot_product_attention(plain, plain, plain)) is Plain
        assert type(F.scaled_dot_product_attention(Q, plain, Q)) is Plain
    assert sdpa.stats()["taken"] == {}


def test_a_parameter_is_a_plain_tensor(as_mps, given):
    given(budget=0)
    with sdpa.installed():
        attend(torch.nn.Parameter(Q))
    assert sdpa.stats()["taken"] == {"memory": 1}


@pytest.mark.parametrize("bias,lengths", [(causal_upper_left, (8, 5)), (causal_lower_right, (5, 8))])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_causal_biases(request, bias, lengths, device):
    if device == "mps":
        request.getfixturevalue("as_mps")
    q, k = Q[:, :, : lengths[0]], Q[:, :, : lengths[1]]
    expected = ORIGINAL(q, k, k, bias(*lengths))
    with sdpa.installed():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, bias(*lengths)), expected)
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, attn_mask=bias(*lengths)), expected)
        compiled = torch.compile(lambda q, k: F.scaled_dot_product_attention(q, k, k, bias(*lengths)), backend="eager")
        torch.testing.assert_close(compiled(q, k), expected)
    assert sum(sdpa.stats()["taken"].values()) == (3 if device == "mps" else 0)
