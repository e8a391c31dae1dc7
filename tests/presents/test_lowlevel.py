"""The private functions: what ring attention is built on. Against autograd through the public ones."""

import inspect

import pytest
import torch

import flash_attn_interface as fa3
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn import flash_attn_interface as interface

from ..attention import oracle

SIZES = [(2, 33, 33, 4, 2), (1, 7, 40, 2, 2)]


def tensors(batch, seqlen_q, seqlen_k, heads, heads_k, dim=16):
    torch.manual_seed(0)
    q = torch.randn(batch, seqlen_q, heads, dim)
    k, v = torch.randn(2, batch, seqlen_k, heads_k, dim)
    return [t.requires_grad_() for t in (q, k.clone(), v.clone())]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True])
def test_dense_equals_autograd(sizes, dropout_p, causal):
    q, k, v = tensors(*sizes)
    dout = torch.randn_like(q)
    torch.manual_seed(3)
    expected = flash_attn_func(q, k, v, dropout_p, causal=causal, window_size=(20, -1), softcap=4.0)
    grads = torch.autograd.grad(expected, (q, k, v), dout)
    torch.manual_seed(3)
    options = (dropout_p, q.shape[-1] ** -0.5, causal, 20, -1, 4.0, None)
    out, lse, probs, rng_state = interface._flash_attn_forward(q, k, v, *options, True)
    torch.testing.assert_close(out, expected.detach())
    assert not out.requires_grad
    assert (probs.numel() > 0) == (dropout_p > 0)
    buffers = [torch.full_like(t, torch.nan, requires_grad=False) for t in (q, k, v)]
    delta = interface._flash_attn_backward(dout, q, k, v, out, lse, *buffers, *options, False, rng_state=rng_state)
    for buffer, grad in zip(buffers, grads, strict=True):
        torch.testing.assert_close(buffer, grad)
    torch.testing.assert_close(delta, (dout * out).sum(-1).transpose(1, 2))


def test_varlen_equals_autograd():
    torch.manual_seed(0)
    cu = torch.tensor([0, 5, 5, 30], dtype=torch.int32)
    q, k, v = (torch.randn(30, 4, 8, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 25, 25, causal=True)
    grads = torch.autograd.grad(expected, (q, k, v), dout)
    out, lse, _, rng_state = interface._flash_attn_varlen_forward(q, k, v, cu, cu, 25, 25, 0.0, 8**-0.5, True)
    torch.testing.assert_close(out, expected.detach())
    buffers = [torch.empty_like(t) for t in (q, k, v)]
    options = (cu, cu, 25, 25, 0.0, 8**-0.5, True, -1, -1, 0.0, None, False)
    interface._flash_attn_varlen_backward(dout, q, k, v, out, lse, *buffers, *options, rng_state)
    for buffer, grad in zip(buffers, grads, strict=True):
        torch.testing.assert_close(buffer, grad)


def test_attention_in_two_parts_of_the_keys():
    """Ring attention: each part alone, merged by the log-sum-exps, and differentiated with the merged ones."""
    q, k, v = tensors(1, 9, 20, 2, 2)
    dout = torch.randn_like(q)
    expected = flash_attn_func(q, k, v)
    grads = torch.autograd.grad(expected, (q, k, v), dout)
    options = (0.0, q.shape[-1] ** -0.5, False, -1, -1, 0.0, None)
    parts = [
        interface._flash_attn_forward(q, kp, vp, *options, False)[:2]
        for kp, vp in zip(k.split(12, 1), v.split(12, 1), strict=True)
    ]
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse).transpose(2, 3)[..., None]
    out = sum(w * o for w, (o, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(out, expected.detach())
    dq, dk, dv = torch.zeros_like(q), [], []
    for kp, vp in zip(k.split(12, 1), v.split(12, 1), strict=True):
        buffers = [torch.empty_like(t) for t in (q, kp, vp)]
        interface._flash_attn_backward(dout, q, kp, vp, out, lse, *buffers, *options, False)
        dq += buffers[0]
        dk.append(buffers[1])
        dv.append(buffers[2])
    for got, grad in zip((dq, torch.cat(dk, 1), torch.cat(dv, 1)), grads, strict=True):
        torch.testing.assert_close(got, grad)


def test_gradients_into_given_buffers_are_optional():
    q, k, v = tensors(*SIZES[0])
    options = (0.0, 0.25, True, -1, -1, 0.0, None)
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, *options, False)
    dk = torch.empty_like(k)
    assert interface._flash_attn_backward(out, q, k, v, out, lse, None, dk, None, *options, False).shape == lse.shape
    assert dk.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dq", torch.empty(1), "dq"),
        ("out", torch.empty(2, 1), "out"),
        ("softmax_lse", None, "softmax_lse"),
        ("rng_state", None, "rng_state"),
    ],
)
def test_malformed(name, value, message):
    q, k, v = tensors(*SIZES[0])
    call = {
        "dout": q,
        "q": q,
        "k": k,
        "v": v,
        "out": q,
        "softmax_lse": torch.zeros(2, 4, 33),
        "dq": None,
        "dk": None,
        "dv": None,
    }
    call |= {
        "dropout_p": 0.5,
        "softmax_scale": 1.0,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
    }
    call |= {"alibi_slopes": None, "deterministic": False, "rng_state": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        interface._flash_attn_backward(**{**call, name: value})


@pytest.mark.parametrize(
    "function", [*(f for n, f in vars(interface).items() if n.startswith("_flash_attn")), fa3._flash_attn_forward]
)
def test_plain_functions_with_upstreams_parameters(function):
    """ring-flash-attention reads the argument names of plain functions, and passes what it finds."""
    assert inspect.isfunction(function)
    assert inspect.getfullargspec(function).args == list(inspect.signature(function).parameters)
    assert inspect.getfullargspec(function).varargs is None


def test_window_is_two_arguments():
    names = inspect.getfullargspec(interface._flash_attn_forward).args
    assert names[3:] == [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size_left",
        "window_size_right",
        "softcap",
        "alibi_slopes",
        "return_softmax",
    ]
    assert interface._wrapped_flash_attn_varlen_backward is interface._flash_attn_varlen_backward


LENGTHS = torch.tensor([0, 4, 11], dtype=torch.int32)
OPTIONS_2 = (0.0, 0.4, True, (5, -1), 2.0, None, False, True)
HOW = {"softmax_scale": 0.4, "causal": True, "window_size": (5, -1), "softcap": 2.0}
# Upstream's order of arguments after the tensors, which is that of its forward functions.
CLASSES = {
    "FlashAttnFunc": ("q, k, v", OPTIONS_2),
    "FlashAttnKVPackedFunc": ("q, kv", OPTIONS_2),
    "FlashAttnQKVPackedFunc": ("qkv", OPTIONS_2),
    "FlashAttnVarlenFunc": ("q, k, v", (LENGTHS, LENGTHS, 7, 7, *OPTIONS_2, None)),
    "FlashAttnVarlenKVPackedFunc": ("q, kv", (LENGTHS, LENGTHS, 7, 7, *OPTIONS_2)),
    "FlashAttnVarlenQKVPackedFunc": ("qkv", (LENGTHS, 7, *OPTIONS_2)),
}
CLASSES_3 = {
    "FlashAttnFunc": ("q, k, v", (0.4, True, None, None, None, None, (5, -1), 0, 2.0, 1, None, False, 0, True)),
    "FlashAttnQKVPackedFunc": ("qkv", (0.4, True, None, None, None, (5, -1), 0, 2.0, False, None, 0, True)),
    "FlashAttnVarlenFunc": (
        "q, k, v",
        (
            LENGTHS,
            LENGTHS,
            None,
            None,
            7,
            7,
            0.4,
            True,
            None,
            None,
            None,
            None,
            (5, -1),
            0,
            2.0,
            1,
            None,
            False,
            0,
            True,
        ),
    ),
}


@pytest.mark.parametrize(
    ("module", "name", "form", "arguments"),
    [(interface, name, *case) for name, case in CLASSES.items()]
    + [(fa3, name, *case) for name, case in CLASSES_3.items()],
)
def test_autograd_classes_by_name(module, name, form, arguments):
    """What `apply` returns and its gradients, with upstream's arguments in order, against the fp64 reference."""
    torch.manual_seed(0)
    shape = (11, 4, 8) if "Varlen" in name else (2, 11, 4, 8)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    packed = {"kv": lambda: torch.stack((k, v), -3), "qkv": lambda: torch.stack((q, k, v), -3)}
    tensors = [packed[n]() if n in packed else {"q": q, "k": k, "v": v}[n] for n in form.split(", ")]
    enabled = [[]] if module is fa3 else [[True], [False]]
    exact_leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    if "Varlen" in name:
        exact, exact_lse, _ = oracle.varlen(*exact_leaves, LENGTHS, LENGTHS, **HOW)
    else:
        exact, exact_lse, _ = oracle.dense(*exact_leaves, **HOW)
    dout = torch.randn(shape)
    exact_grads = torch.autograd.grad(exact, exact_leaves, dout.double())
    for flag in enabled:
        out, lse, *_ = getattr(module, name).apply(*tensors, *arguments, *flag)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
        assert out.requires_grad == (flag != [False])
        if out.requires_grad:
            for got, want in zip(torch.autograd.grad(out, (q, k, v), dout), exact_grads, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [interface, fa3])
def test_small_helpers(module):
    x = torch.arange(6.0).reshape(2, 3)
    assert module.maybe_contiguous(None) is None
    assert module.maybe_contiguous(x) is x
    assert module.maybe_contiguous(x[:, ::3]).stride(-1) == 1
    assert torch.equal(module.maybe_contiguous(x[:, ::2]), x[:, [0, 2]])
    assert [module.round_multiple(n, 32) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]


@pytest.mark.parametrize("is_dropout", [False, True])
def test_block_size_takes_s_dmask_apart(is_dropout):
    """Upstream's tests restore the probabilities of S_dmask tile by tile; they are there whatever the tile."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, 16) for _ in range(3))
    out, lse, probs = flash_attn_func(q, k, v, 0.3, return_attn_probs=True)
    block = interface._get_block_size_n(q.device, 16, is_dropout, False)
    assert block % 32 == 0
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).double() / 4
    tiles = zip(
        probs.split(block, -1), scores.split(block, -1), v.transpose(1, 2).double().split(block, 2), strict=True
    )
    restored = torch.zeros(1, 2, 300, 16, dtype=torch.float64)
    for signed, score, value in tiles:
        torch.testing.assert_close(signed.abs().double(), torch.exp(score - lse[..., None]), rtol=1e-4, atol=1e-6)
        restored += signed.double().clamp(min=0.0) / 0.7 @ value
    torch.testing.assert_close(out.double(), restored.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_3(packed):
    """Forward and backward of the top-level module: the gradients of its public functions."""
    torch.manual_seed(0)
    cu = torch.tensor([0, 12, 30], dtype=torch.int32)
    shape = (30, 2, 8) if packed else (2, 15, 2, 8)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 18, "max_seqlen_k": 18} if packed else {}
    public = fa3.flash_attn_varlen_func if packed else fa3.flash_attn_func
    expected = public(q, k, v, **lengths, causal=True, softcap=3.0)
    grads = torch.autograd.grad(expected, (q, k, v), dout)
    out, lse, *accumulators = fa3._flash_attn_forward(q, k, v, **lengths, causal=True, softcap=3.0)
    torch.testing.assert_close(out, expected.detach())
    assert [t.numel() for t in accumulators] == [0, 0]
    buffers = [torch.empty_like(t) for t in (q, k, v)]
    options = dict(zip(("dq", "dk", "dv"), buffers, strict=True), is_causal=True, softcap=3.0)
    fa3._flash_attn_backward(dout, q, k, v, out, lse, **lengths, **options)
    for buffer, grad in zip(buffers, grads, strict=True):
        torch.testing.assert_close(buffer, grad)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_num_splits_changes_nothing(num_splits):
    """The last argument, which 2.8.3 did not have."""
    torch.manual_seed(0)
    cu_q, cu_k = (torch.tensor(starts, dtype=torch.int32) for starts in ([0, 1, 2], [0, 13, 45]))
    q, pages = torch.randn(2, 4, 8), torch.randn(4, 16, 2, 8)
    options = {"softmax_scale": 0.3, "causal": True, "block_table": torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)}
    call = (q, pages, pages, cu_q, cu_k, 1, 32, 0.0)
    expected = interface._flash_attn_varlen_forward(*call, **options)
    for mine, wanted in zip(
        interface._flash_attn_varlen_forward(*call, **options, num_splits=num_splits), expected, strict=True
    ):
        assert torch.equal(mine, wanted)
    with pytest.raises(ValueError, match="num_splits: got"):
        interface._flash_attn_varlen_forward(*call, **options, num_splits="many")


def test_flash_attention_3_appends_to_a_cache():
    torch.manual_seed(0)
    q, k_new, v_new = (torch.randn(2, 3, 2, 8) for _ in range(3))
    caches = torch.randn(2, 2, 16, 2, 8)
    seqlens = torch.tensor([4, 9], dtype=torch.int32)
    again = caches.clone()
    expected = fa3.flash_attn_with_kvcache(q, *again, k_new, v_new, cache_seqlens=seqlens, causal=True)
    out, lse, *_ = fa3._flash_attn_forward(q, *caches, k_new, v_new, seqused_k=seqlens, causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(caches, again)
    whole = {"cache_seqlens": seqlens + 3, "causal": True, "return_softmax_lse": True}
    out, again_lse, *accumulators = fa3.flash_attn_with_kvcache(q, *caches, **whole)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(again_lse, lse)
    assert [t.numel() for t in accumulators] == [0, 0], "as many values as upstream's"
    plan = fa3.get_scheduler_metadata(2, 3, 16, 2, 2, 8, seqlens + 3, qkv_dtype=torch.float32, causal=True)
    assert (plan.dtype, plan.device) == (torch.int32, seqlens.device)
    out, *_ = fa3.flash_attn_with_kvcache(q, *caches, scheduler_metadata=plan, num_splits=4, **whole)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", ["sequed_q", "sequed_k", "cu_seqlens_k"])
def test_flash_attention_3_backward_refuses_lengths_that_it_would_not_look_at(name):
    q = torch.randn(2, 15, 2, 8)
    lengths = {name: torch.tensor([3, 4], dtype=torch.int32)}
    with pytest.raises(NotImplementedError, match=name):
        fa3._flash_attn_backward(q, q, q, q, q, torch.zeros(2, 2, 15), **lengths)


@pytest.mark.parametrize("name", ["v_new", "rotary_sin", "seqlens_rotary", "cu_seqlens_k_new", "kv_batch_idx"])
def test_flash_attention_3_forward_refuses_what_belongs_to_a_cache(name):
    q = torch.randn(2, 15, 2, 8)
    with pytest.raises(NotImplementedError, match=name):
        fa3._flash_attn_forward(q, q, q, **{name: torch.zeros(2, dtype=torch.int32)})


@pytest.mark.parametrize("name", ["k", "qv"])
def test_a_cache_never_loses_a_gradient_in_silence(name):
    torch.manual_seed(0)
    new = {n: torch.randn(1, 2, 2, 8) for n in ("k", "v", "qv")}
    new[name].requires_grad_()
    cos, sin = torch.randn(2, 16, 4)
    caches = torch.randn(2, 1, 16, 2, 8)
    options = {"rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": 5, "causal": True}
    out = fa3.flash_attn_with_kvcache(torch.randn(1, 2, 2, 8), *caches, **new, **options)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        out.sum().backward()
