"""The public functions with the runner in the product's seam: served by a Metal tier, in one launch, right."""

import pytest
import torch

from flash_attn_mps import trace
from flash_attn_mps.frontends import fa2, fa3
from metal_host import observe
from tests.attention import oracle
from tests.attention import test_kvcache as kvcache
from tests.attention import test_quantised as quantised
from tests.attention.layouts import randn
from tests.attention.pairwise import case_id
from tests.attention.rule import verify
from tests.attention.test_varlen import cumulative, paged

LENGTHS_Q, LENGTHS_K = [5, 0, 33, 8], [12, 4, 33, 0]
CU_Q, CU_K = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
HOW = {"causal": True, "window_size": (20, 0), "softcap": 5.0, "softmax_scale": 0.3}


@pytest.fixture
def served(monkeypatch):
    """The launches of a test; asserts that its calls were served by Metal tiers, each in one launch of its kernel."""
    monkeypatch.setattr(trace, "enabled", True)
    monkeypatch.setattr(trace, "calls", trace.Counter())
    with observe(instrumented=False) as launches:
        yield launches
    tiers = [call.tier for call in trace.calls.elements()]
    assert tiers
    entries = {"simdgroup": "attention_forward", "decode": "attention_decode"}
    attention = [launch.kernel for launch in launches if launch.kernel != "rotate_and_append"]
    assert attention == [entries[tier] for tier in tiers]


def random(*names_and_shapes, dtype=torch.bfloat16):
    return {name: randn(*shape, dtype=dtype) for name, *shape in names_and_shapes}


DENSE = random(("q", 2, 33, 4, 64), ("k", 2, 40, 2, 64), ("v", 2, 40, 2, 64))
VARLEN = random(("q", 46, 4, 64), ("k", 49, 2, 64), ("v", 49, 2, 64))


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("alibi", [None, "H", "BH"])
def test_flash_attn_func(alibi, probs):
    slopes = {None: None, "H": torch.rand(4), "BH": torch.rand(2, 4)}[alibi]
    verify(
        lambda *qkv: fa2.flash_attn_func(*qkv, return_attn_probs=probs, alibi_slopes=slopes, **HOW),
        lambda *qkv: oracle.dense(*qkv, alibi_slopes=slopes, **HOW),
        DENSE,
    )


WIDE = (2**31 - 1, 2**31 - 1)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("window", [(WIDE[0], -1), (-1, WIDE[1]), WIDE, (WIDE[0], 0), (3, WIDE[1])], ids=str)
@pytest.mark.parametrize("lengths", [(40, 20), (20, 40)], ids=str)
def test_a_window_wider_than_any_sequence_hides_nothing_on_that_side(window, lengths):
    """As an open side, which is another kernel. Added to a position, such a width would be beyond an int."""
    seqlen_q, seqlen_k = lengths
    tensors = random(("q", 1, seqlen_q, 2, 16), ("k", 1, seqlen_k, 1, 16), ("v", 1, seqlen_k, 1, 16))
    as_open = tuple(-1 if side == WIDE[0] else side for side in window)
    verify(
        lambda *qkv: fa2.flash_attn_func(*qkv, return_attn_probs=True, window_size=window),
        lambda *qkv: oracle.dense(*qkv, window_size=as_open),
        tensors,
    )


@pytest.mark.usefixtures("served")
def test_flash_attn_func_of_fa3():
    verify(
        lambda *qkv: fa3.flash_attn_func(*qkv, return_attn_probs=True, **HOW),
        lambda *qkv: oracle.dense(*qkv, **HOW),
        DENSE,
    )


@pytest.mark.usefixtures("served")
def test_qv():
    """FlashAttention 3's second query: a product over both head dims, 32 + 64."""
    tensors = random(("q", 2, 20, 4, 32), ("qv", 2, 20, 4, 64), ("k", 2, 30, 2, 32), ("v", 2, 30, 2, 64))
    verify(
        lambda q, qv, k, v: fa3.flash_attn_func(q, k, v, qv=qv, causal=True),
        lambda q, qv, k, v: oracle.dense(q, k, v, qv=qv, causal=True),
        tensors,
    )


@pytest.mark.usefixtures("served")
def test_packed_functions():
    """The parts of a packed tensor are views of it: other strides, the same kernel."""
    verify(
        lambda qkv: fa2.flash_attn_qkvpacked_func(qkv, causal=True),
        lambda qkv: oracle.dense(*qkv.unbind(2), causal=True),
        random(("qkv", 2, 33, 3, 4, 64)),
    )
    verify(
        lambda q, kv: fa2.flash_attn_kvpacked_func(q, kv, causal=True),
        lambda q, kv: oracle.dense(q, *kv.unbind(2), causal=True),
        random(("q", 2, 33, 4, 64), ("kv", 2, 40, 2, 2, 64)),
    )


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("probs", [False, True])
def test_varlen_functions(probs):
    verify(
        lambda *qkv: fa2.flash_attn_varlen_func(*qkv, CU_Q, CU_K, 33, torch.tensor(33), return_attn_probs=probs, **HOW),
        lambda *qkv: oracle.varlen(*qkv, CU_Q, CU_K, **HOW),
        VARLEN,
    )
    verify(
        lambda q, kv: fa2.flash_attn_varlen_kvpacked_func(q, kv, CU_Q, CU_K, 33, 33, return_attn_probs=probs, **HOW),
        lambda q, kv: oracle.varlen(q, *kv.unbind(1), CU_Q, CU_K, **HOW),
        random(("q", 46, 4, 64), ("kv", 49, 2, 2, 64)),
    )
    verify(
        lambda qkv: fa2.flash_attn_varlen_qkvpacked_func(qkv, CU_Q, 33, return_attn_probs=probs, **HOW),
        lambda qkv: oracle.varlen(*qkv.unbind(1), CU_Q, CU_Q, **HOW),
        random(("qkv", 46, 3, 4, 64)),
    )


@pytest.mark.usefixtures("served")
def test_varlen_of_fa3_with_seqused():
    used_q, used_k = (torch.tensor(n, dtype=torch.int32) for n in ([5, 0, 20, 1], [7, 4, 33, 0]))
    verify(
        lambda *qkv: fa3.flash_attn_varlen_func(
            *qkv, CU_Q, CU_K, 33, 33, used_q, used_k, return_attn_probs=True, **HOW
        ),
        lambda *qkv: oracle.varlen(*qkv, CU_Q, CU_K, seqused_q=used_q, seqused_k=used_k, **HOW),
        VARLEN,
    )


@pytest.mark.usefixtures("served")
def test_varlen_with_a_block_table():
    (k_pages, table), (v_pages, _) = (paged(VARLEN[name], LENGTHS_K, 16) for name in "kv")
    verify(
        lambda q, k, v: fa2.flash_attn_varlen_func(q, k_pages, v_pages, CU_Q, CU_K, 33, 33, block_table=table),
        lambda q, k, v: oracle.varlen(q, k, v, CU_Q, CU_K),
        VARLEN,
    )


@pytest.mark.parametrize("case", kvcache.CASES[::6], ids=case_id)
def test_kvcache_calls(case, served):
    kvcache.test_against_the_oracle(case)
    before = [] if case["seqlen_new"] is None else ["rotate_and_append"]
    assert [launch.kernel for launch in served[:-1]] == before


@pytest.mark.parametrize("case", quantised.CASES[::5], ids=case_id)
def test_quantised_calls(case, served):
    quantised.test_against_the_oracle(case)
    before = ["rotate_and_append"] if case["new"] else []
    assert [launch.kernel for launch in served[:-1]] == before


@pytest.mark.metal_full
@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("case", kvcache.CASES, ids=case_id)
def test_every_kvcache_call(case):
    kvcache.test_against_the_oracle(case)


@pytest.mark.parametrize(
    ("how", "tier"),
    [({"dropout_p": 0.1, "return_attn_probs": True}, "torch"), ({"seqlen_k": 0}, "torch")],
    ids=str,
)
def test_what_the_kernels_refuse_other_tiers_serve(how, tier, monkeypatch):
    how = dict(how)
    monkeypatch.setattr(trace, "enabled", True)
    monkeypatch.setattr(trace, "calls", trace.Counter())
    seqlen_k = how.pop("seqlen_k", 9)
    q = torch.randn(1, 9, 2, 64)
    k, v = (torch.randn(1, seqlen_k, 2, 64) for _ in range(2))
    with observe(instrumented=False) as launches:
        fa2.flash_attn_func(q, k, v, **how)
    assert not launches
    assert [call.tier for call in trace.calls] == [tier]
