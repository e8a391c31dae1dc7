"""Lengths that lie on a device: nothing reads them on the host, and the numbers are the same.

A CPU tensor whose class refuses to be read stands for a tensor on a GPU. Bounds that are too generous, as callers
announce them when they do not know better, are part of it.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_mps.frontends import fa2, fa3

from . import oracle
from .layouts import randn, random_dout
from .pairwise import case_id, pairwise
from .rule import assert_lse, assert_within_rule, verify
from .test_dense import DTYPES, MASKS, alibi_slopes
from .test_kvcache import CASES as KVCACHE_CASES
from .test_kvcache import build, in_double, poison_beyond
from .test_varlen import LENGTHS, cumulative, longest, paged

READS = {
    getattr(torch.Tensor, name)
    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__int__",
        "__float__",
        "__bool__",
        "__index__",
        "__array__",
        "__len__",
    )
} - {torch.Tensor.__len__}


class OnDevice(torch.Tensor):
    """Data that the host may not look at."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func not in READS, f"the host read a tensor of lengths: {func.__name__}"
        return super().__torch_function__(func, types, args, kwargs or {})


class NoWaiting(TorchDispatchMode):
    """Refuses the operations whose result the host waits for, of whatever tensor."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"the host would wait for {name}"
        if name in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), (
                "a boolean index waits for its count"
            )
        return func(*args, **(kwargs or {}))


def on_device(x):
    return x.as_subclass(OnDevice)


VARLEN_CASES = pairwise(
    lengths=list(LENGTHS),
    max_seqlen=["int", "generous"],
    same=[False, True],
    dtype=DTYPES,
    heads=[(3, 3), (4, 2)],
    dims=[(32, 32), (40, 72)],
    mask=list(MASKS),
    softcap=[0.0, 1.5],
    alibi=[None, "BH"],
    page_size=[None, 16],
    probs=[False, True],
)


@pytest.mark.parametrize("case", VARLEN_CASES, ids=case_id)
def test_varlen(case):
    lengths_q, lengths_k = LENGTHS[case["lengths"]]
    (dim, dim_v), (heads, heads_k), dtype = case["dims"], case["heads"], case["dtype"]
    lengths_k = lengths_q if case["same"] else lengths_k
    cu_q = cu_k = on_device(cumulative(lengths_q))
    if not case["same"]:
        cu_k = on_device(cumulative(lengths_k))
    tensors = {
        "q": randn(sum(lengths_q), heads, dim, dtype=dtype),
        "k": randn(sum(lengths_k), heads_k, dim, dtype=dtype),
        "v": randn(sum(lengths_k), heads_k, dim_v, dtype=dtype),
    }
    how = {
        **MASKS[case["mask"]],
        "softcap": case["softcap"],
        "alibi_slopes": alibi_slopes(case["alibi"], len(lengths_q), heads),
    }
    bounds = longest(lengths_q, case["max_seqlen"]), longest(lengths_k, case["max_seqlen"])
    table = {}
    if case["page_size"] is not None:
        pages = {name: paged(tensors[name], lengths_k, case["page_size"]) for name in "kv"}
        table = {"block_table": on_device(pages["k"][1])}

    def call(q, k, v):
        if table:
            k, v = pages["k"][0], pages["v"][0]
        with NoWaiting():
            return fa2.flash_attn_varlen_func(
                q, k, v, cu_q, cu_k, *bounds, return_attn_probs=case["probs"], **how, **table
            )

    plain_cu = cumulative(lengths_q), cumulative(lengths_k)
    result = verify(
        call,
        lambda *qkv: oracle.varlen(*qkv, *plain_cu, **how),
        tensors,
        dout=None if table else random_dout("contiguous"),
    )
    assert type(result[0] if case["probs"] else result) is torch.Tensor


@pytest.mark.parametrize("used_q", [None, [1, 10, 7]])
@pytest.mark.parametrize("used_k", [None, [20, 0, 4]])
@pytest.mark.parametrize("mask", ["none", "causal", "both"])
def test_seqused(mask, used_q, used_k):
    cu_q, cu_k = cumulative([5, 12, 7]), cumulative([20, 14, 4])
    used = {"seqused_q": used_q, "seqused_k": used_k}
    used = {name: None if value is None else torch.tensor(value, dtype=torch.int32) for name, value in used.items()}
    hidden = {name: None if value is None else on_device(value) for name, value in used.items()}
    verify(
        lambda *qkv: fa3.flash_attn_varlen_func(
            *qkv, on_device(cu_q), on_device(cu_k), 12, 20, return_attn_probs=True, **MASKS[mask], **hidden
        ),
        lambda *qkv: oracle.varlen(*qkv, cu_q, cu_k, **MASKS[mask], **used),
        {name: randn(n, 2, 16, dtype=torch.float32) for name, n in (("q", 24), ("k", 38), ("v", 38))},
        dout=random_dout("contiguous"),
    )


# Without those that have no tensor of lengths or indices.
ON_DEVICE = [case for case in KVCACHE_CASES if case["lengths"] in ("tensor", "zero") or case["where"] != "rows"]


@pytest.mark.parametrize("case", ON_DEVICE[::2], ids=case_id)
def test_kvcache(case):
    q, k_cache, v_cache, call, lengths = build(case)
    for cache in (k_cache, v_cache):
        poison_beyond(cache, call, lengths, case["seqlen_new"] or 0)
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), **in_double(call))
    plain = oracle.kvcache(q, k_cache, v_cache, **call)
    hidden = {
        name: on_device(x) if isinstance(x, torch.Tensor) and x.dtype == torch.int32 else x for name, x in call.items()
    }
    with NoWaiting():
        out, lse = fa2.flash_attn_with_kvcache(q, k_cache, v_cache, return_softmax_lse=True, **hidden)
    assert_within_rule("out", out, plain.out, exact.out)
    if "rotary_cos" not in call:
        assert_lse(lse, exact.lse)
    for name, cache, cache_plain, cache_exact in (
        ("k_cache", k_cache, plain.k_cache, exact.k_cache),
        ("v_cache", v_cache, plain.v_cache, exact.v_cache),
    ):
        assert torch.equal(cache.isnan(), cache_exact.isnan()), f"{name}: written outside of its sequence"
        assert_within_rule(name, *(torch.nan_to_num(x) for x in (cache, cache_plain, cache_exact)))


def test_dropout():
    cu = on_device(cumulative([5, 30, 8]))
    seen = {}

    def call(q, k, v):
        result = fa2.flash_attn_varlen_func(q, k, v, cu, cu, 30, 30, dropout_p=0.4, return_attn_probs=True)
        seen["keep"] = ~torch.signbit(result[2])
        return result

    plain = cumulative([5, 30, 8])
    verify(
        call,
        lambda *qkv: oracle.varlen(*qkv, plain, plain, keep=seen["keep"], dropout_p=0.4),
        {name: randn(43, 2, 16, dtype=torch.float32) for name in "qkv"},
        dout=random_dout("contiguous"),
        dropout_p=0.4,
    )
