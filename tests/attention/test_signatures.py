"""Names, order, kinds and defaults of every parameter, as callers read them with inspect.signature.

The data restates Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py of 2.8.3,
hopper/flash_attn_interface.py of the main branch.
"""

import inspect

import pytest

from flash_attn_mps.frontends import fa2, fa3

REQUIRED = inspect.Parameter.empty

_FA2_TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}


def required(*names):
    return dict.fromkeys(names, REQUIRED)


_CU = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

FA2 = {
    "flash_attn_func": required("q", "k", "v") | _FA2_TAIL,
    "flash_attn_qkvpacked_func": required("qkv") | _FA2_TAIL,
    "flash_attn_kvpacked_func": required("q", "kv") | _FA2_TAIL,
    "flash_attn_varlen_func": required("q", "k", "v", *_CU) | _FA2_TAIL | {"block_table": None},
    "flash_attn_varlen_qkvpacked_func": required("qkv", "cu_seqlens", "max_seqlen") | _FA2_TAIL,
    "flash_attn_varlen_kvpacked_func": required("q", "kv", *_CU) | _FA2_TAIL,
    "flash_attn_with_kvcache": required("q", "k_cache", "v_cache")
    | {
        "k": None,
        "v": None,
        "rotary_cos": None,
        "rotary_sin": None,
        "cache_seqlens": None,
        "cache_batch_idx": None,
        "cache_leftpad": None,
        "block_table": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
}

_FA3_TAIL = {
    "softmax_scale": None,
    "causal": False,
    "qv": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
    "window_size": (-1, -1),
    "attention_chunk": 0,
    "softcap": 0.0,
    "num_splits": 1,
    "pack_gqa": None,
    "deterministic": False,
    "sm_margin": 0,
    "return_attn_probs": False,
}

FA3 = {
    "flash_attn_func": required("q", "k", "v") | _FA3_TAIL,
    "flash_attn_varlen_func": required("q", "k", "v", *_CU) | {"seqused_q": None, "seqused_k": None} | _FA3_TAIL,
    "flash_attn_with_kvcache": required("q", "k_cache", "v_cache")
    | {
        "k": None,
        "v": None,
        "qv": None,
        "rotary_cos": None,
        "rotary_sin": None,
        "cache_seqlens": None,
        "cache_batch_idx": None,
        "cache_leftpad": None,
        "page_table": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k_new": None,
        "max_seqlen_q": None,
        "rotary_seqlens": None,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "attention_chunk": 0,
        "softcap": 0.0,
        "rotary_interleaved": True,
        "scheduler_metadata": None,
        "num_splits": 0,
        "pack_gqa": None,
        "sm_margin": 0,
        "return_softmax_lse": False,
    },
}

FA3["flash_attn_qkvpacked_func"] = required("qkv") | {
    name: _FA3_TAIL.get(name)
    for name in (
        "softmax_scale",
        "causal",
        "q_descale",
        "k_descale",
        "v_descale",
        "window_size",
        "attention_chunk",
        "softcap",
        "deterministic",
        "num_heads_q",
        "sm_margin",
        "return_attn_probs",
    )
}
FA3["flash_attn_combine"] = required("out_partial", "lse_partial") | {"out": None, "out_dtype": None}

FUNCTIONS = [(fa2, name, expected) for name, expected in FA2.items()]
FUNCTIONS += [(fa3, name, expected) for name, expected in FA3.items()]


@pytest.mark.parametrize(("module", "name", "expected"), FUNCTIONS, ids=[f"{m.__name__}.{n}" for m, n, _ in FUNCTIONS])
def test_signature(module, name, expected):
    function = getattr(module, name)
    assert inspect.isfunction(function), "callers use inspect.getfullargspec, which wants a plain function"
    parameters = inspect.signature(function).parameters
    assert {p: v.default for p, v in parameters.items()} == expected
    assert list(parameters) == list(expected)
    assert {v.kind for v in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    for p, default in expected.items():  # 0 == 0.0 == False, but a caller that prints or serialises sees the difference
        assert type(parameters[p].default) is type(default), p
    assert function.__name__ == name
    assert function.__doc__


@pytest.mark.parametrize("name", FA2)
def test_direct_api(name):
    """The package itself gives the FlashAttention-2 functions."""
    import flash_attn_mps

    assert getattr(flash_attn_mps, name) is getattr(fa2, name)
