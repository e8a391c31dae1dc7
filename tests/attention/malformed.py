"""Tables of malformed calls, for test_malformed.py.

A row is (what is wrong, what to change in a good call, the argument that the message must name, or the arguments of
which it must name one).
"""

import numpy as np
import torch

from flash_attn_mps.frontends import fa2, fa2_private, fa3, fa3_private, heads_first

from .hostile import nested, quantized

NAN, INF = float("nan"), float("inf")
F16, F64 = torch.float16, torch.float64


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def dense():
    return {"q": torch.randn(2, 8, 4, 16), "k": torch.randn(2, 9, 2, 16), "v": torch.randn(2, 9, 2, 16)}


def varlen():
    return {
        "q": torch.randn(8, 4, 16),
        "k": torch.randn(9, 2, 16),
        "v": torch.randn(9, 2, 16),
        "cu_seqlens_q": ints(0, 5, 8),
        "cu_seqlens_k": ints(0, 2, 9),
        "max_seqlen_q": 5,
        "max_seqlen_k": 7,
    }


def paged_varlen():
    pages = {"k": torch.randn(6, 4, 2, 16), "v": torch.randn(6, 4, 2, 16), "block_table": ints([5, 0], [3, 1])}
    return varlen() | pages


def qkvpacked():
    return {"qkv": torch.randn(2, 8, 3, 4, 16)}


def kvpacked():
    return {"q": torch.randn(2, 8, 4, 16), "kv": torch.randn(2, 9, 2, 2, 16)}


def flat_qkv():
    return {"qkv": torch.randn(2, 8, 8, 16), "num_heads_q": 4}


def varlen_qkvpacked():
    return {"qkv": torch.randn(8, 3, 4, 16), "cu_seqlens": ints(0, 5, 8), "max_seqlen": 5}


def varlen_kvpacked():
    call = varlen()
    return {"q": call.pop("q"), "kv": torch.randn(9, 2, 2, 16)} | {n: call[n] for n in call if n not in ("k", "v")}


def kvcache():
    return {
        "q": torch.randn(2, 3, 4, 16),
        "k_cache": torch.randn(2, 12, 2, 16),
        "v_cache": torch.randn(2, 12, 2, 16),
        "cache_seqlens": ints(5, 9),
    }


def append():
    new = {"k": torch.randn(2, 3, 2, 16), "v": torch.randn(2, 3, 2, 16)}
    return kvcache() | new | {"rotary_cos": torch.randn(12, 8), "rotary_sin": torch.randn(12, 8)}


def paged_kvcache():
    pages = {"k_cache": torch.randn(6, 4, 2, 16), "v_cache": torch.randn(6, 4, 2, 16)}
    return kvcache() | pages | {"block_table": ints([5, 0, 2], [3, 1, 4])}


def private():
    more = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size_left": -1, "window_size_right": -1}
    return dense() | more | {"softcap": 0.0, "alibi_slopes": None, "return_softmax": False}


def private_backward():
    call = private()
    out, lse, *_ = fa2_private._flash_attn_forward(**call)
    grads = {"dq": torch.empty(2, 8, 4, 16), "dk": torch.empty(2, 9, 2, 16), "dv": torch.empty(2, 9, 2, 16)}
    del call["return_softmax"]
    call |= grads | {"dout": torch.randn(2, 8, 4, 16), "out": out, "softmax_lse": lse}
    return call | {"deterministic": False, "rng_state": torch.tensor([3, 0])}


def private3_backward():
    call = private_backward()
    names = ("q", "k", "v", "dout", "out", "softmax_lse", "dq", "dk", "dv")
    return {name: call[name] for name in names}


def private3_varlen_backward():
    call = varlen()
    out, lse, *_ = fa3_private._flash_attn_forward(**call)
    return call | {"dout": torch.randn(8, 4, 16), "out": out, "softmax_lse": lse}


def combine():
    return {"out_partial": torch.randn(3, 2, 8, 4, 16), "lse_partial": torch.randn(3, 2, 8, 4)}


def heads_first_call():
    return {"query": torch.randn(2, 4, 8, 16), "key": torch.randn(2, 2, 9, 16), "value": torch.randn(2, 2, 9, 16)}


def flag_rows(*names):
    """What says neither True nor False, or would be true whatever it says."""
    values = {
        "tensor of two": torch.tensor([True, False]),
        "empty tensor": torch.empty(0),
        "meta tensor": torch.ones((), device="meta"),
        "nested tensor": nested(torch.ones(1)),
        "array of two": np.array([1, 2]),
        "text": "False",
        "tuple": (-1, -1),
        "list": [False],
    }
    return [(f"{name} {what}", lambda a, n=name, v=v: {n: v}, name) for name in names for what, v in values.items()]


def integer_rows(name):
    values = {
        "beyond 64 bits": 10**30,
        "below 64 bits": -(10**30),
        "longer than Python prints": 10**5000,
        "real": 1.5,
        "complex": 1 + 1j,
        "complex tensor": torch.tensor(5 + 0j),
        "bool tensor": torch.tensor(True),
        "vector": torch.tensor([1, 2]),
        "uint64 tensor": torch.tensor(2**63, dtype=torch.uint64),
        "sparse tensor": torch.tensor(5).to_sparse(),
        "nested tensor": nested(torch.ones(1)),
        "text": "5",
        "None": None,
    }
    return [(f"{name} {what}", lambda a, v=v: {name: v}, name) for what, v in values.items()]


def number_rows(name):
    values = {
        "complex": 1 + 1j,
        "complex tensor": torch.tensor(1 + 1j),
        "complex NumPy number": np.complex64(1),
        "complex array": np.array(1 + 1j),
        "bool tensor": torch.tensor(True),
        "bool": True,
        "vector": torch.ones(1),
        "array": np.ones(1),
        "meta tensor": torch.ones((), device="meta"),
        "nested tensor": nested(torch.ones(1)),
        "NumPy text": np.str_("1"),
        "bytes": b"1",
        "beyond float32": 1e39,
        "array beyond float32": np.array(-1e39),
        "tensor beyond float32": torch.tensor(1e39, dtype=torch.float64),
        "too large for a float": 10**400,
    }
    return [(f"{name} {what}", lambda a, v=v: {name: v}, name) for what, v in values.items()]


# Rows that hold for every FlashAttention-2 function: the arguments that all of them have.
RULES = [
    ("softmax_scale nan", lambda a: {"softmax_scale": NAN}, "softmax_scale"),
    ("softmax_scale inf", lambda a: {"softmax_scale": INF}, "softmax_scale"),
    ("softmax_scale text", lambda a: {"softmax_scale": "0.1"}, "softmax_scale"),
    ("softmax_scale vector", lambda a: {"softmax_scale": torch.ones(4)}, "softmax_scale"),
    ("softmax_scale too large for a float", lambda a: {"softmax_scale": 10**400}, "softmax_scale"),
    ("window_size one", lambda a: {"window_size": (1,)}, "window_size"),
    ("window_size three", lambda a: {"window_size": (1, 2, 3)}, "window_size"),
    ("window_size int", lambda a: {"window_size": 4}, "window_size"),
    ("window_size None", lambda a: {"window_size": None}, "window_size"),
    ("window_size float", lambda a: {"window_size": (1.5, 2)}, "window_size"),
    ("window_size text", lambda a: {"window_size": "ab"}, "window_size"),
    ("softcap negative", lambda a: {"softcap": -1.0}, "softcap"),
    ("softcap nan", lambda a: {"softcap": NAN}, "softcap"),
    ("softcap inf", lambda a: {"softcap": INF}, "softcap"),
    ("softcap text", lambda a: {"softcap": "30"}, "softcap"),
    ("softcap None", lambda a: {"softcap": None}, "softcap"),
    ("alibi heads", lambda a: {"alibi_slopes": torch.ones(5)}, "alibi_slopes"),
    ("alibi batch", lambda a: {"alibi_slopes": torch.ones(3, 4)}, "alibi_slopes"),
    ("alibi rank", lambda a: {"alibi_slopes": torch.ones(1, 2, 4)}, "alibi_slopes"),
    ("alibi int", lambda a: {"alibi_slopes": torch.ones(4, dtype=torch.int32)}, "alibi_slopes"),
    ("alibi fp64", lambda a: {"alibi_slopes": torch.ones(4, dtype=F64)}, "alibi_slopes"),
    ("alibi fp16", lambda a: {"alibi_slopes": torch.ones(4, dtype=F16)}, "alibi_slopes"),
    ("alibi list", lambda a: {"alibi_slopes": [1.0] * 4}, "alibi_slopes"),
    ("alibi device", lambda a: {"alibi_slopes": torch.ones(4, device="meta")}, "alibi_slopes"),
]

# Further kinds of the wrong thing, which are refused in one place: a function of each sort has them.
KINDS = [
    *flag_rows("causal"),
    *number_rows("softmax_scale"),
    *number_rows("softcap"),
    ("softcap that float32 rounds to 0", lambda a: {"softcap": 1e-46}, "softcap"),
    ("softcap that is no normal float32", lambda a: {"softcap": 1e-39}, "softcap"),
    ("softmax_scale fp64 tensor nan", lambda a: {"softmax_scale": torch.tensor(NAN).double()}, "softmax_scale"),
    ("softmax_scale sparse vector", lambda a: {"softmax_scale": torch.ones(2).to_sparse()}, "softmax_scale"),
    ("window_size meta", lambda a: {"window_size": torch.ones(2, dtype=torch.int64, device="meta")}, "window_size"),
    ("window_size nested", lambda a: {"window_size": nested(torch.ones(1))}, "window_size"),
    ("window_size sparse", lambda a: {"window_size": torch.tensor([1, 2]).to_sparse()}, "window_size"),
    ("window_size complex", lambda a: {"window_size": torch.ones(2, dtype=torch.complex64)}, "window_size"),
    ("window_size bools", lambda a: {"window_size": (True, False)}, "window_size"),
    ("window_size left beyond 64 bits", lambda a: {"window_size": (10**30, 0)}, "window_size"),
    ("window_size right beyond 64 bits", lambda a: {"window_size": (0, -(10**30))}, "window_size"),
    ("alibi nested", lambda a: {"alibi_slopes": nested(torch.ones(4))}, "alibi_slopes"),
    ("alibi sparse", lambda a: {"alibi_slopes": torch.ones(4).to_sparse()}, "alibi_slopes"),
    ("alibi complex", lambda a: {"alibi_slopes": torch.ones(4, dtype=torch.complex64)}, "alibi_slopes"),
    ("alibi quantized", lambda a: {"alibi_slopes": quantized(torch.ones(4))}, "alibi_slopes"),
]
# These have no `alibi_slopes`.
RULES3 = [row for row in RULES if "alibi" not in row[0]]
KINDS3 = [row for row in KINDS if "alibi" not in row[0]]
FLAGS = flag_rows("deterministic", "return_attn_probs")
CHUNK = [
    *integer_rows("attention_chunk"),
    ("attention_chunk negative", lambda a: {"attention_chunk": -1}, "attention_chunk"),
]

DROPOUT = [
    *number_rows("dropout_p"),
    ("dropout negative", lambda a: {"dropout_p": -0.1}, "dropout_p"),
    ("dropout one", lambda a: {"dropout_p": 1.0}, "dropout_p"),
    ("dropout above one", lambda a: {"dropout_p": 1.5}, "dropout_p"),
    ("dropout nan", lambda a: {"dropout_p": NAN}, "dropout_p"),
    ("dropout text", lambda a: {"dropout_p": "0.1"}, "dropout_p"),
    ("dropout None", lambda a: {"dropout_p": None}, "dropout_p"),
]


def dtypes(*names):
    """What no function takes as a dtype, in all tensors at once; the message must name one of them."""
    return [
        (f"{dtype} tensors", lambda a, dtype=dtype: {n: getattr(a, n).to(dtype) for n in names}, names)
        for dtype in (F64, torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    ]


def not_tensors(*names):
    kinds = [
        ("numpy", lambda x: x.numpy()),
        ("list", lambda x: x.tolist()),
        ("None", lambda x: None),
        ("text", lambda x: "x"),
        ("nested", nested),
        ("jagged", lambda x: nested(x, torch.jagged)),
        ("sparse", lambda x: x.to_sparse()),
        ("quantized", quantized),
    ]
    return [
        (f"{name} {kind}", lambda a, n=name, make=make: {n: make(getattr(a, n))}, name)
        for name in names
        for kind, make in kinds
    ]


DENSE = [
    ("q rank 3", lambda a: {"q": a.q[0]}, "q"),
    ("k rank 3", lambda a: {"k": a.k[0]}, "k"),
    ("v rank 5", lambda a: {"v": a.v[None]}, "v"),
    ("q rank 0", lambda a: {"q": torch.tensor(1.0)}, "q"),
    ("batch of k", lambda a: {"k": a.k[:1]}, ("k",)),
    ("batch of v", lambda a: {"v": a.v[:1]}, ("v",)),
    ("heads of v", lambda a: {"v": a.v[:, :, :1]}, ("v",)),
    ("heads not divisible", lambda a: {"q": torch.randn(2, 8, 5, 16)}, ("q", "k")),
    ("more kv heads", lambda a: {"q": torch.randn(2, 8, 1, 16)}, ("q", "k")),
    ("no kv heads", lambda a: {"k": a.k[:, :, :0], "v": a.v[:, :, :0]}, ("k", "v")),
    ("head_dim of k", lambda a: {"k": a.k[..., :8]}, "k"),
    ("seqlen of v", lambda a: {"v": a.v[:, :8]}, "v"),
    ("dtype of k", lambda a: {"k": a.k.half()}, "k"),
    ("dtype of v", lambda a: {"v": a.v.bfloat16()}, "v"),
    ("dtype of q", lambda a: {"q": a.q.half()}, ("q", "k")),
    ("device of q", lambda a: {"q": a.q.to("meta")}, ("q", "k")),
    ("device of v", lambda a: {"v": a.v.to("meta")}, "v"),
    ("head_dim 513", lambda a: {n: torch.randn(2, 8, 2, 513) for n in "qkv"}, ("q", "k", "v")),
    ("head_dim_v 640", lambda a: {"v": torch.randn(2, 9, 2, 640)}, "v"),
    ("head_dim 0", lambda a: {"q": a.q[..., :0], "k": a.k[..., :0]}, ("q", "k")),
    ("head_dim_v 0", lambda a: {"v": a.v[..., :0]}, "v"),
    ("sparse k", lambda a: {"k": a.k.to_sparse()}, "k"),
    *dtypes("q", "k", "v"),
    *not_tensors("q", "k", "v"),
]


def cu_rows(name, other=None):
    """What may be wrong with the int32 tensor (0, 5, 8) or (0, 2, 9)."""
    named = (name, other) if other else name
    return [
        (f"{name} int64", lambda a: {name: getattr(a, name).long()}, name),
        (f"{name} float", lambda a: {name: getattr(a, name).float()}, name),
        (f"{name} rank 2", lambda a: {name: getattr(a, name)[None]}, name),
        (f"{name} rank 0", lambda a: {name: getattr(a, name)[0]}, name),
        (f"{name} empty", lambda a: {name: getattr(a, name)[:0]}, named),
        (f"{name} begins at 1", lambda a: {name: getattr(a, name) + ints(1, 0, 0)}, name),
        (f"{name} decreases", lambda a: {name: torch.stack((ints(0)[0], ints(9)[0], getattr(a, name)[-1] - 1))}, name),
        (f"{name} negative", lambda a: {name: getattr(a, name) + ints(0, -20, 0)}, name),
        (f"{name} ends late", lambda a: {name: getattr(a, name) + ints(0, 0, 1)}, name),
        (f"{name} device", lambda a: {name: getattr(a, name).to("meta")}, name),
        *not_tensors(name),
    ]


def max_seqlen_rows(name):
    return [
        (f"{name} too small", lambda a: {name: 4}, name),
        (f"{name} zero", lambda a: {name: 0}, name),
        (f"{name} negative", lambda a: {name: -1}, name),
        (f"{name} float", lambda a: {name: 7.0}, name),
        (f"{name} fractional", lambda a: {name: 7.5}, name),
        (f"{name} None", lambda a: {name: None}, name),
        (f"{name} vector", lambda a: {name: ints(7, 7)}, name),
        (f"{name} float tensor", lambda a: {name: torch.tensor(7.0)}, name),
        (f"{name} small tensor", lambda a: {name: ints(4)[0]}, name),
        *integer_rows(name),
    ]


VARLEN = [
    ("q rank 4", lambda a: {"q": a.q[None]}, "q"),
    ("k rank 4 without block_table", lambda a: {"k": a.k[None]}, "k"),
    ("v rank 2", lambda a: {"v": a.v[0]}, "v"),
    ("total of v", lambda a: {"v": a.v[:-1]}, "v"),
    ("heads of v", lambda a: {"v": a.v[:, :1]}, "v"),
    ("heads not divisible", lambda a: {"q": torch.randn(8, 3, 16)}, ("q", "k")),
    ("head_dim of k", lambda a: {"k": a.k[..., :8]}, "k"),
    ("dtype of v", lambda a: {"v": a.v.half()}, "v"),
    ("head_dim 600", lambda a: {"q": torch.randn(8, 4, 600), "k": torch.randn(9, 2, 600)}, ("q", "k")),
    ("batch of cu_seqlens_q", lambda a: {"cu_seqlens_q": ints(0, 8)}, ("cu_seqlens_q", "cu_seqlens_k")),
    ("batch of cu_seqlens_k", lambda a: {"cu_seqlens_k": ints(0, 2, 5, 9)}, ("cu_seqlens_q", "cu_seqlens_k")),
    *cu_rows("cu_seqlens_q", "cu_seqlens_k"),
    *cu_rows("cu_seqlens_k", "cu_seqlens_q"),
    *max_seqlen_rows("max_seqlen_q"),
    *max_seqlen_rows("max_seqlen_k"),
    *dtypes("q", "k", "v"),
    *not_tensors("q", "k", "v"),
]

PAGED = [
    ("block_table int64", lambda a: {"block_table": a.block_table.long()}, "block_table"),
    ("block_table float", lambda a: {"block_table": a.block_table.float()}, "block_table"),
    ("block_table rank 1", lambda a: {"block_table": a.block_table[0]}, "block_table"),
    ("block_table rank 3", lambda a: {"block_table": a.block_table[None]}, "block_table"),
    ("block_table batch", lambda a: {"block_table": a.block_table[:1]}, "block_table"),
    ("block_table beyond the blocks", lambda a: {"block_table": a.block_table + 3}, "block_table"),
    ("block_table negative", lambda a: {"block_table": a.block_table - 4}, "block_table"),
    (
        "block_table narrow",
        lambda a: {"block_table": a.block_table[:, :1]},
        ("block_table", "cu_seqlens_k", "cache_seqlens"),
    ),
    ("block_table device", lambda a: {"block_table": a.block_table.to("meta")}, "block_table"),
    ("block_table list", lambda a: {"block_table": a.block_table.tolist()}, "block_table"),
    ("block_table numpy", lambda a: {"block_table": a.block_table.numpy()}, "block_table"),
    ("block_table nested", lambda a: {"block_table": nested(a.block_table)}, "block_table"),
    ("block_table sparse", lambda a: {"block_table": a.block_table.to_sparse()}, "block_table"),
]

# Without pages, whatever it is: not that k is no page.
NO_PAGES = [
    ("block_table text", lambda a: {"block_table": "x"}, "block_table"),
    ("block_table flag", lambda a: {"block_table": False}, "block_table"),
    ("block_table of rows", lambda a: {"block_table": ints([0, 1], [2, 3])}, "block_table"),
]

PAGED_VARLEN = [
    *PAGED,
    ("pages of k rank 3", lambda a: {"k": a.k[0]}, "k"),
    ("pages of v rank 3", lambda a: {"v": a.v[0]}, "v"),
    ("number of pages of v", lambda a: {"v": a.v[:-1]}, "v"),
    ("page size of v", lambda a: {"v": a.v[:, :2]}, "v"),
    ("page size 0", lambda a: {"k": a.k[:, :0], "v": a.v[:, :0]}, ("k", "block_table", "cu_seqlens_k")),
    (
        "cu_seqlens_k beyond the table",
        lambda a: {"cu_seqlens_k": ints(0, 9, 12), "max_seqlen_k": 9},
        ("block_table", "cu_seqlens_k"),
    ),
]

QKVPACKED = [
    ("qkv rank 4", lambda a: {"qkv": a.qkv[0]}, "qkv"),
    ("qkv rank 6", lambda a: {"qkv": a.qkv[None]}, "qkv"),
    ("qkv of two", lambda a: {"qkv": a.qkv[:, :, :2]}, "qkv"),
    ("qkv of four", lambda a: {"qkv": torch.randn(2, 8, 4, 4, 16)}, "qkv"),
    ("qkv packed elsewhere", lambda a: {"qkv": a.qkv.transpose(2, 3)}, "qkv"),
    ("qkv head_dim 513", lambda a: {"qkv": torch.randn(1, 4, 3, 1, 513)}, "qkv"),
    ("qkv head_dim 0", lambda a: {"qkv": a.qkv[..., :0]}, "qkv"),
    *dtypes("qkv"),
    *not_tensors("qkv"),
]

KVPACKED = [
    ("kv rank 4", lambda a: {"kv": a.kv[0]}, "kv"),
    ("kv of three", lambda a: {"kv": torch.randn(2, 9, 3, 2, 16)}, "kv"),
    ("q rank 5", lambda a: {"q": a.q[None]}, "q"),
    ("kv batch", lambda a: {"kv": a.kv[:1]}, "kv"),
    ("kv head_dim", lambda a: {"kv": a.kv[..., :8]}, "kv"),
    ("kv heads not divisible", lambda a: {"kv": torch.randn(2, 9, 2, 3, 16)}, ("q", "kv")),
    ("kv dtype", lambda a: {"kv": a.kv.half()}, "kv"),
    ("kv device", lambda a: {"kv": a.kv.to("meta")}, "kv"),
    *dtypes("q", "kv"),
    *not_tensors("q", "kv"),
]

VARLEN_QKVPACKED = [
    ("qkv rank 5", lambda a: {"qkv": a.qkv[None]}, "qkv"),
    ("qkv of two", lambda a: {"qkv": a.qkv[:, :2]}, "qkv"),
    *cu_rows("cu_seqlens"),
    *max_seqlen_rows("max_seqlen"),
    *not_tensors("qkv"),
]

VARLEN_KVPACKED = [
    ("kv rank 5", lambda a: {"kv": a.kv[None]}, "kv"),
    ("kv of three", lambda a: {"kv": torch.randn(9, 3, 2, 16)}, "kv"),
    ("kv dtype", lambda a: {"kv": a.kv.half()}, "kv"),
    ("kv total", lambda a: {"kv": a.kv[:-1]}, ("kv", "cu_seqlens_k")),
    *cu_rows("cu_seqlens_k", "cu_seqlens_q"),
    *max_seqlen_rows("max_seqlen_q"),
    *not_tensors("q", "kv"),
]

KVCACHE = [
    ("q rank 3", lambda a: {"q": a.q[0]}, "q"),
    ("k_cache rank 3", lambda a: {"k_cache": a.k_cache[0]}, "k_cache"),
    ("v_cache rank 5", lambda a: {"v_cache": a.v_cache[None]}, "v_cache"),
    ("k_cache head_dim", lambda a: {"k_cache": a.k_cache[..., :8]}, "k_cache"),
    ("v_cache heads", lambda a: {"v_cache": a.v_cache[:, :, :1]}, "v_cache"),
    ("v_cache length", lambda a: {"v_cache": a.v_cache[:, :10]}, "v_cache"),
    ("v_cache batch", lambda a: {"v_cache": a.v_cache[:1]}, "v_cache"),
    ("k_cache dtype", lambda a: {"k_cache": a.k_cache.half()}, "k_cache"),
    ("v_cache dtype", lambda a: {"v_cache": a.v_cache.half()}, "v_cache"),
    ("k_cache device", lambda a: {"k_cache": a.k_cache.to("meta")}, "k_cache"),
    ("cache heads not divisible", lambda a: {"q": torch.randn(2, 3, 3, 16)}, ("q", "k_cache")),
    ("fewer cache rows", lambda a: {"k_cache": a.k_cache[:1], "v_cache": a.v_cache[:1]}, ("k_cache", "q")),
    (
        "head_dim 513",
        lambda a: {"q": torch.randn(2, 3, 2, 513), "k_cache": torch.randn(2, 12, 2, 513)},
        ("q", "k_cache"),
    ),
    ("cache_seqlens too large", lambda a: {"cache_seqlens": ints(5, 13)}, "cache_seqlens"),
    ("cache_seqlens int too large", lambda a: {"cache_seqlens": 13}, "cache_seqlens"),
    ("cache_seqlens negative", lambda a: {"cache_seqlens": ints(5, -1)}, "cache_seqlens"),
    ("cache_seqlens int negative", lambda a: {"cache_seqlens": -1}, "cache_seqlens"),
    ("cache_seqlens batch", lambda a: {"cache_seqlens": ints(5, 5, 5)}, "cache_seqlens"),
    ("cache_seqlens rank", lambda a: {"cache_seqlens": ints([5, 5])}, "cache_seqlens"),
    ("cache_seqlens int64", lambda a: {"cache_seqlens": a.cache_seqlens.long()}, "cache_seqlens"),
    ("cache_seqlens float tensor", lambda a: {"cache_seqlens": a.cache_seqlens.float()}, "cache_seqlens"),
    ("cache_seqlens float", lambda a: {"cache_seqlens": 5.0}, "cache_seqlens"),
    ("cache_seqlens list", lambda a: {"cache_seqlens": [5, 9]}, "cache_seqlens"),
    ("cache_seqlens numpy", lambda a: {"cache_seqlens": np.array([5, 9])}, "cache_seqlens"),
    ("cache_seqlens device", lambda a: {"cache_seqlens": a.cache_seqlens.to("meta")}, "cache_seqlens"),
    ("cache_batch_idx too large", lambda a: {"cache_batch_idx": ints(0, 2)}, "cache_batch_idx"),
    ("cache_batch_idx negative", lambda a: {"cache_batch_idx": ints(0, -1)}, "cache_batch_idx"),
    ("cache_batch_idx batch", lambda a: {"cache_batch_idx": ints(0)}, "cache_batch_idx"),
    ("cache_batch_idx int64", lambda a: {"cache_batch_idx": torch.tensor([0, 1])}, "cache_batch_idx"),
    ("cache_batch_idx list", lambda a: {"cache_batch_idx": [0, 1]}, "cache_batch_idx"),
    ("cache_batch_idx rank", lambda a: {"cache_batch_idx": ints([0, 1])}, "cache_batch_idx"),
    ("cache_leftpad negative", lambda a: {"cache_leftpad": ints(0, -1)}, "cache_leftpad"),
    ("cache_leftpad beyond the length", lambda a: {"cache_leftpad": ints(0, 10)}, ("cache_leftpad",)),
    ("cache_leftpad batch", lambda a: {"cache_leftpad": ints(0)}, "cache_leftpad"),
    ("cache_leftpad int64", lambda a: {"cache_leftpad": torch.tensor([0, 1])}, "cache_leftpad"),
    ("cache_leftpad int", lambda a: {"cache_leftpad": 1}, "cache_leftpad"),
    (
        "rotary without k",
        lambda a: {"rotary_cos": torch.ones(12, 8), "rotary_sin": torch.ones(12, 8)},
        ("rotary_cos", "rotary_sin"),
    ),
    ("num_splits text", lambda a: {"num_splits": "many"}, "num_splits"),
    *integer_rows("num_splits"),
    *[row for row in integer_rows("cache_seqlens") if "None" not in row[0]],
    *flag_rows("return_softmax_lse", "rotary_interleaved"),
    *dtypes("q", "k_cache", "v_cache"),
    *not_tensors("q", "k_cache", "v_cache"),
]

APPEND = [
    ("k_cache expanded", lambda a: {"k_cache": a.k_cache[:1].expand(2, -1, -1, -1)}, "k_cache"),
    ("v_cache expanded", lambda a: {"v_cache": a.v_cache[:, :1].expand(-1, 12, -1, -1)}, "v_cache"),
    ("k without v", lambda a: {"v": None}, ("k", "v")),
    ("v without k", lambda a: {"k": None, "rotary_cos": None, "rotary_sin": None}, ("k", "v")),
    ("k without cache_seqlens", lambda a: {"cache_seqlens": None}, "cache_seqlens"),
    ("k rank 3", lambda a: {"k": a.k[0]}, "k"),
    ("k batch", lambda a: {"k": a.k[:1]}, "k"),
    ("k and v of one sequence, for all entries", lambda a: {"k": a.k[:1], "v": a.v[:1]}, "k"),
    ("k heads", lambda a: {"k": torch.randn(2, 3, 4, 16)}, "k"),
    ("k head_dim", lambda a: {"k": a.k[..., :8]}, "k"),
    ("k dtype", lambda a: {"k": a.k.half()}, "k"),
    ("k device", lambda a: {"k": a.k.to("meta")}, "k"),
    ("k list", lambda a: {"k": a.k.tolist()}, "k"),
    ("v length", lambda a: {"v": a.v[:, :2]}, "v"),
    ("v heads", lambda a: {"v": a.v[:, :, :1]}, "v"),
    ("v head_dim", lambda a: {"v": a.v[..., :8]}, "v"),
    ("v dtype", lambda a: {"v": a.v.half()}, "v"),
    ("no room", lambda a: {"cache_seqlens": ints(5, 10)}, ("k", "cache_seqlens")),
    (
        "k longer than the cache",
        lambda a: {"k": torch.randn(2, 13, 2, 16), "v": torch.randn(2, 13, 2, 16)},
        ("k", "cache_seqlens"),
    ),
    ("cache_batch_idx too large", lambda a: {"cache_batch_idx": ints(3, 0)}, "cache_batch_idx"),
    ("cos without sin", lambda a: {"rotary_sin": None}, "rotary_sin"),
    ("sin without cos", lambda a: {"rotary_cos": None}, "rotary_sin"),
    ("cos rank", lambda a: {"rotary_cos": a.rotary_cos[None]}, "rotary_cos"),
    ("sin width", lambda a: {"rotary_sin": a.rotary_sin[:, :4]}, "rotary_sin"),
    ("sin length", lambda a: {"rotary_sin": a.rotary_sin[:-1]}, "rotary_sin"),
    (
        "rotary too wide",
        lambda a: {n: torch.ones(12, 9) for n in ("rotary_cos", "rotary_sin")},
        ("rotary_cos", "rotary_sin"),
    ),
    (
        "rotary too short",
        lambda a: {n: torch.ones(6, 8) for n in ("rotary_cos", "rotary_sin")},
        ("rotary_cos", "rotary_sin"),
    ),
    (
        "rotary too short for the queries",
        lambda a: {"q": torch.randn(2, 8, 4, 16), "causal": True},
        ("rotary_cos", "rotary_sin"),
    ),
    (
        "rotary too short, one length",
        lambda a: {"cache_seqlens": 9, **{n: torch.ones(11, 8) for n in ("rotary_cos", "rotary_sin")}},
        ("rotary_cos", "rotary_sin"),
    ),
    (
        "rotary too short for the queries, one length",
        lambda a: {"cache_seqlens": 9, "q": torch.randn(2, 8, 4, 16), "causal": True},
        ("rotary_cos", "rotary_sin"),
    ),
    ("cos int", lambda a: {"rotary_cos": a.rotary_cos.int()}, "rotary_cos"),
    ("cos list", lambda a: {"rotary_cos": a.rotary_cos.tolist()}, "rotary_cos"),
    ("cos device", lambda a: {"rotary_cos": a.rotary_cos.to("meta")}, "rotary_cos"),
]

PAGED_KVCACHE = [
    *PAGED,
    ("cache_leftpad beyond the length", lambda a: {"cache_leftpad": ints(0, 10)}, "cache_leftpad"),
    ("cache_batch_idx beyond the table", lambda a: {"cache_batch_idx": ints(0, 2)}, "cache_batch_idx"),
    ("cache_batch_idx negative", lambda a: {"cache_batch_idx": ints(-1, 0)}, "cache_batch_idx"),
    ("cache_batch_idx batch", lambda a: {"cache_batch_idx": ints(0)}, "cache_batch_idx"),
    ("cache_batch_idx int64", lambda a: {"cache_batch_idx": torch.tensor([0, 1])}, "cache_batch_idx"),
    ("entries of the table", lambda a: {"block_table": a.block_table.repeat(2, 1)}, "block_table"),
    ("cache_seqlens beyond the table", lambda a: {"cache_seqlens": ints(5, 13)}, ("cache_seqlens", "block_table")),
    ("page size of v_cache", lambda a: {"v_cache": a.v_cache[:, :2]}, "v_cache"),
    (
        "k without room",
        lambda a: {"k": torch.randn(2, 4, 2, 16), "v": torch.randn(2, 4, 2, 16)},
        ("k", "cache_seqlens", "block_table"),
    ),
]

SEQUSED = [
    ("seqused_k too large", lambda a: {"seqused_k": ints(3, 7)}, "seqused_k"),
    ("seqused_q negative", lambda a: {"seqused_q": ints(-1, 3)}, "seqused_q"),
    ("seqused_q batch", lambda a: {"seqused_q": ints(1)}, "seqused_q"),
    ("seqused_k int64", lambda a: {"seqused_k": torch.tensor([1, 1])}, "seqused_k"),
    ("seqused_k list", lambda a: {"seqused_k": [1, 1]}, "seqused_k"),
]

NUM_HEADS = [
    *integer_rows("num_heads_q"),
    ("num_heads_q that k does not divide", lambda a: {"num_heads_q": 2}, "num_heads_q"),
    ("num_heads_q of all heads", lambda a: {"num_heads_q": 8}, "num_heads_q"),
]
BACKWARD = [
    *[
        row
        for name in ("dout", "out", "softmax_lse")
        for row in (
            (f"{name} dtype", lambda a, n=name: {n: getattr(a, n).double()}, name),
            (f"{name} complex", lambda a, n=name: {n: getattr(a, n).to(torch.complex64)}, name),
            (f"{name} device", lambda a, n=name: {n: getattr(a, n).to("meta")}, name),
            (f"{name} rank", lambda a, n=name: {n: getattr(a, n)[0]}, name),
        )
    ],
    *[
        row
        for name in ("dq", "dk", "dv")
        for row in (
            (f"{name} int", lambda a, n=name: {n: getattr(a, n).int()}, name),
            (f"{name} complex", lambda a, n=name: {n: getattr(a, n).to(torch.complex64)}, name),
            (f"{name} device", lambda a, n=name: {n: getattr(a, n).to("meta")}, name),
            (f"{name} rank", lambda a, n=name: {n: getattr(a, n)[0]}, name),
            (f"{name} expanded", lambda a, n=name: {n: getattr(a, n)[:1].expand(getattr(a, n).shape)}, name),
            (f"{name} nested", lambda a, n=name: {n: nested(getattr(a, n))}, name),
            (f"{name} sparse", lambda a, n=name: {n: getattr(a, n).to_sparse()}, name),
        )
    ],
    *not_tensors("dout", "out", "softmax_lse"),
]
SIDES = [*integer_rows("window_size_left"), *integer_rows("window_size_right")]
PRIVATE = [row for row in RULES + DROPOUT + KINDS if "window_size" not in row[0]] + SIDES
RNG_STATE = [
    (f"rng_state {what}", lambda a, value=value: {"dropout_p": 0.1, "rng_state": value}, "rng_state")
    for what, value in {
        "None": None,
        "list": [3, 0],
        "int32": ints(3, 0),
        "vector of three": torch.tensor([3, 0, 0]),
        "meta": torch.ones(2, dtype=torch.int64, device="meta"),
        "nested": nested(torch.ones(1)),
        "sparse": torch.tensor([3, 0]).to_sparse(),
    }.items()
]
COMBINE = [
    *not_tensors("out_partial", "lse_partial"),
    ("out_partial rank", lambda a: {"out_partial": a.out_partial[0, 0]}, "out_partial"),
    ("out_partial int", lambda a: {"out_partial": a.out_partial.int()}, "out_partial"),
    ("out_partial complex", lambda a: {"out_partial": a.out_partial.to(torch.complex64)}, "out_partial"),
    ("lse_partial shape", lambda a: {"lse_partial": a.lse_partial[:, :1]}, "lse_partial"),
    ("lse_partial complex", lambda a: {"lse_partial": a.lse_partial.to(torch.complex64)}, "lse_partial"),
    ("lse_partial device", lambda a: {"lse_partial": a.lse_partial.to("meta")}, "lse_partial"),
    ("out_dtype text", lambda a: {"out_dtype": "float16"}, "out_dtype"),
    ("out_dtype int", lambda a: {"out_dtype": torch.int32}, "out_dtype"),
    ("out shape", lambda a: {"out": torch.empty(2, 8, 4, 1)}, "out"),
    ("out int", lambda a: {"out": torch.empty(2, 8, 4, 16, dtype=torch.int32)}, "out"),
    ("out device", lambda a: {"out": torch.empty(2, 8, 4, 16, device="meta")}, "out"),
    ("out expanded", lambda a: {"out": torch.empty(2, 8, 4, 1).expand(2, 8, 4, 16)}, "out"),
]
PRIVATE3 = [
    *[row for row in RULES3 if "window_size" not in row[0]],
    *SIDES,
    *integer_rows("num_splits"),
    ("out_ list", lambda a: {"out_": []}, "out_"),
    ("out_ shape", lambda a: {"out_": torch.empty(2, 8, 4, 1)}, "out_"),
    ("out_ int", lambda a: {"out_": torch.empty(2, 8, 4, 16, dtype=torch.int32)}, "out_"),
    ("out_ device", lambda a: {"out_": torch.empty(2, 8, 4, 16, device="meta")}, "out_"),
    ("out_ expanded", lambda a: {"out_": torch.empty(2, 8, 4, 1).expand(2, 8, 4, 16)}, "out_"),
    ("page_table text", lambda a: {"page_table": "x", "cu_seqlens_k": ints(0, 9)}, ("page_table", "cu_seqlens_k")),
    ("cu_seqlens_q text", lambda a: {"cu_seqlens_q": "x"}, "cu_seqlens_q"),
    ("cu_seqlens_q of dense queries", lambda a: {"cu_seqlens_q": ints(0, 8)}, "cu_seqlens_q"),
]
SEQUSED3 = [
    (f"{name} {what}", lambda a, name=name, value=value: {name: value}, name)
    for name in ("sequed_q", "sequed_k")
    for what, value in (
        ("list", [1, 1]),
        ("int64", torch.tensor([1, 1])),
        ("batch", ints(1)),
        ("negative", ints(-1, 1)),
    )
]
HEADS_FIRST = [
    *not_tensors("query", "key", "value"),
    *dtypes("query", "key", "value"),
    *flag_rows("is_causal"),
    *[
        (f"scale {row[0]}", lambda a, row=row: {"scale": row[1](a)["softmax_scale"]}, "scale")
        for row in number_rows("softmax_scale")
    ],
    *number_rows("dropout_p"),
    ("batch of key", lambda a: {"key": torch.randn(3, 2, 9, 16)}, "key"),
    ("no batch of value", lambda a: {"value": a.value[:0]}, "value"),
    ("batch of query", lambda a: {"query": a.query[:0]}, "query"),
    ("attn_mask text", lambda a: {"attn_mask": "x"}, "attn_mask"),
    ("attn_mask nested", lambda a: {"attn_mask": nested(torch.ones(8, 9))}, "attn_mask"),
    ("attn_mask complex", lambda a: {"attn_mask": torch.ones(8, 9, dtype=torch.complex64)}, "attn_mask"),
    ("attn_mask with is_causal", lambda a: {"attn_mask": torch.ones(8, 9), "is_causal": True}, "attn_mask"),
]

TABLES = [
    (fa2.flash_attn_func, dense, DENSE + FLAGS + RULES + DROPOUT + KINDS),
    (fa2.flash_attn_varlen_func, varlen, VARLEN + NO_PAGES + FLAGS + RULES + DROPOUT),
    (fa2.flash_attn_varlen_func, paged_varlen, PAGED_VARLEN),
    (fa2.flash_attn_qkvpacked_func, qkvpacked, QKVPACKED + FLAGS + RULES + DROPOUT),
    (fa2.flash_attn_kvpacked_func, kvpacked, KVPACKED + FLAGS + RULES + DROPOUT),
    (fa2.flash_attn_varlen_qkvpacked_func, varlen_qkvpacked, VARLEN_QKVPACKED + FLAGS + RULES + DROPOUT),
    (fa2.flash_attn_varlen_kvpacked_func, varlen_kvpacked, VARLEN_KVPACKED + FLAGS + RULES + DROPOUT),
    (fa2.flash_attn_with_kvcache, kvcache, KVCACHE + RULES + KINDS),
    (fa2.flash_attn_with_kvcache, append, APPEND),
    (fa2.flash_attn_with_kvcache, paged_kvcache, PAGED_KVCACHE),
    (fa2_private._flash_attn_forward, private, PRIVATE + flag_rows("return_softmax")),
    (fa2_private._flash_attn_backward, private_backward, PRIVATE + BACKWARD + RNG_STATE + flag_rows("deterministic")),
    (fa3.flash_attn_func, dense, DENSE + FLAGS + CHUNK + RULES3 + KINDS3),
    (fa3.flash_attn_func, dense, integer_rows("num_splits")),
    (fa3.flash_attn_varlen_func, varlen, VARLEN + SEQUSED + FLAGS + CHUNK + RULES3),
    (fa3.flash_attn_qkvpacked_func, qkvpacked, not_tensors("qkv") + FLAGS + CHUNK + RULES3),
    (fa3.flash_attn_qkvpacked_func, flat_qkv, not_tensors("qkv") + NUM_HEADS),
    (fa3.flash_attn_with_kvcache, kvcache, KVCACHE + CHUNK + RULES3),
    (fa3.flash_attn_combine, combine, COMBINE),
    (fa3_private._flash_attn_forward, dense, PRIVATE3),
    (
        fa3_private._flash_attn_backward,
        private3_backward,
        BACKWARD + SEQUSED3 + flag_rows("is_causal", "deterministic"),
    ),
    (fa3_private._flash_attn_backward, private3_varlen_backward, SEQUSED3),
    (heads_first.flash_attention, heads_first_call, HEADS_FIRST),
]
