"""Calls with hostile arguments: each gives a right result, or an error that names an argument that was hostile.

    python -m tests.attention.fuzz_arguments [--calls 60000] [--seed 0] [--only flash_attn_varlen]

A call is a good one in which one or two arguments are replaced (hostile.py). Right is what the `torch` tier gives
too, and what is a number where the arguments are numbers. An error is a ValueError or a NotImplementedError in this
package's words, with the name of an argument that was replaced as the caller writes it. A warning counts as an error of
another kind: NumPy and PyTorch warn where they guess what was meant.
"""

import argparse
import collections
import inspect
import os
import random
import re
import sys
import time
import warnings
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from flash_attn_mps.frontends import fa2, fa2_private, fa3, fa3_private, heads_first
from flash_attn_mps.integrations import transformers, transformers_fa2

from . import malformed
from .hostile import ANYTHING, OF_A_TENSOR
from .malformed import ints

TAME = 1e4  # beyond, scores are so large that two right results differ, or that float32 ends


def _with(good, renamed=None, **more):
    """`good` with arguments under other names, and more of them."""

    def call():
        renamed_ = {(renamed or {}).get(name, name): value for name, value in good().items()}
        return renamed_ | {name: make() if callable(make) else make for name, make in more.items()}

    return call


def _private(good):
    required = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size_left": 4, "window_size_right": 2}
    return _with(good, **required, softcap=0.0, alibi_slopes=None)


def _backward(good, forward, **more):
    """A good call of a backward function: with what the forward one gives."""

    def call():
        a = good()
        lengths = {name: value for name, value in a.items() if "seqlen" in name}
        out, lse, *_ = forward(a["q"], a["k"], a["v"], **lengths)
        buffers = {f"d{name}": torch.empty_like(a[name]) for name in "qkv"}
        more_ = {name: make() if callable(make) else make for name, make in more.items()}
        return a | buffers | {"dout": torch.randn_like(out), "out": out, "softmax_lse": lse} | more_

    return call


_dense2 = partial(
    fa2_private._flash_attn_forward,
    **{"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size_left": -1, "window_size_right": -1},
    **{"softcap": 0.0, "alibi_slopes": None, "return_softmax": False},
)
_varlen2 = partial(fa2_private._flash_attn_varlen_forward, dropout_p=0.0, softmax_scale=None, causal=False)
_AGAIN = {"deterministic": False, "rng_state": lambda: torch.tensor([7, 0])}
_CACHE3 = {"k_cache": "k", "v_cache": "v", "k": "k_new", "v": "v_new", "cache_seqlens": "seqused_k"}
_PAGES3 = {"block_table": "page_table"}


class _Layer(torch.nn.Module):
    config = SimpleNamespace(sliding_window=None)


def _heads_first():
    return {"query": torch.randn(2, 4, 8, 16), "key": torch.randn(2, 2, 9, 16), "value": torch.randn(2, 2, 9, 16)}


def _transformers(mask):
    options = {"attention_mask": mask, "is_causal": True, "sliding_window": 4, "s_aux": lambda: torch.randn(4)}
    return _with(_heads_first, module=_Layer, **options)


#: What is called, and the good calls of it.
CALLS = [
    (fa2.flash_attn_func, malformed.dense),
    (fa2.flash_attn_qkvpacked_func, malformed.qkvpacked),
    (fa2.flash_attn_kvpacked_func, malformed.kvpacked),
    (fa2.flash_attn_varlen_func, malformed.varlen),
    (fa2.flash_attn_varlen_func, malformed.paged_varlen),
    (fa2.flash_attn_varlen_qkvpacked_func, malformed.varlen_qkvpacked),
    (fa2.flash_attn_varlen_kvpacked_func, malformed.varlen_kvpacked),
    (fa2.flash_attn_with_kvcache, malformed.kvcache),
    (fa2.flash_attn_with_kvcache, malformed.append),
    (fa2.flash_attn_with_kvcache, malformed.paged_kvcache),
    (fa2_private._flash_attn_forward, _with(_private(malformed.dense), return_softmax=False)),
    (fa2_private._flash_attn_varlen_forward, _private(malformed.varlen)),
    (fa2_private._flash_attn_varlen_forward, _private(malformed.paged_varlen)),
    (fa2_private._flash_attn_backward, _backward(_private(malformed.dense), _dense2, **_AGAIN)),
    (fa2_private._flash_attn_varlen_backward, _backward(_private(malformed.varlen), _varlen2, **_AGAIN)),
    (fa3.flash_attn_func, malformed.dense),
    (fa3.flash_attn_func, _with(malformed.dense, qv=lambda: torch.randn(2, 8, 4, 16))),
    (fa3.flash_attn_qkvpacked_func, malformed.qkvpacked),
    (fa3.flash_attn_qkvpacked_func, _with(dict, qkv=lambda: torch.randn(2, 8, 8, 16), num_heads_q=4)),
    (fa3.flash_attn_varlen_func, malformed.varlen),
    (fa3.flash_attn_varlen_func, _with(malformed.varlen, seqused_q=lambda: ints(4, 3), seqused_k=lambda: ints(1, 7))),
    (fa3.flash_attn_with_kvcache, malformed.kvcache),
    (fa3.flash_attn_with_kvcache, malformed.append),
    (fa3.flash_attn_with_kvcache, _with(malformed.paged_kvcache, _PAGES3)),
    (
        fa3.flash_attn_combine,
        lambda: {"out_partial": torch.randn(3, 2, 8, 4, 16), "lse_partial": torch.randn(3, 2, 8, 4)},
    ),
    (
        fa3.get_scheduler_metadata,
        _with(lambda: dict(zip(_METADATA, (1, 1, 256, 8, 4, 64), strict=True)), cache_seqlens=5),
    ),
    (fa3_private._flash_attn_forward, malformed.dense),
    (fa3_private._flash_attn_forward, _with(malformed.dense, out_=lambda: torch.empty(2, 8, 4, 16))),
    (fa3_private._flash_attn_forward, malformed.varlen),
    (fa3_private._flash_attn_forward, _with(malformed.paged_varlen, _PAGES3)),
    (fa3_private._flash_attn_forward, _with(malformed.append, _CACHE3)),
    (fa3_private._flash_attn_backward, _backward(malformed.dense, fa3_private._flash_attn_forward)),
    (fa3_private._flash_attn_backward, _backward(malformed.varlen, fa3_private._flash_attn_forward)),
    (heads_first.flash_attention, _heads_first),
    (heads_first.flash_attention, _with(_heads_first, attn_mask=lambda: torch.randn(8, 9))),
    (transformers.attention, _transformers(None)),
    (transformers.attention, _transformers(lambda: torch.randn(2, 1, 8, 9))),
    (transformers.attention, _transformers(lambda: torch.arange(9) < torch.tensor([[9], [8]]))),
    (transformers_fa2.flash_attn_func, _with(malformed.dense, s_aux=lambda: torch.randn(4))),
    (transformers_fa2.flash_attn_varlen_func, _with(malformed.varlen, s_aux=lambda: torch.randn(4))),
]
_IN_WORDS = {"q": ("the queries",), "qkv": ("the queries",), "query": ("the queries",)}
_METADATA = ("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim")
_OPTIONS = {
    "causal": True,
    "window_size": (3, 1),
    "softcap": 2.0,
    "softmax_scale": 0.3,
    "dropout_p": 0.2,
    "return_attn_probs": True,
    "return_softmax_lse": True,
    "attention_chunk": 4,
}


def call_of(seed, only=""):
    """(a function, the arguments of a call of it, which of them are hostile); the same for the same seed."""
    random_ = random.Random(seed)
    torch.manual_seed(seed)
    function, good = random_.choice([row for row in CALLS if only in name_of(row[0])])
    parameters = [name for name in inspect.signature(function).parameters if name not in ("module", "kwargs")]
    arguments = good()
    for name, value in _OPTIONS.items():
        if name in parameters and random_.random() < 0.2:
            arguments[name] = value
    names = random_.sample(parameters, min(random_.choice((1, 1, 2)), len(parameters)))
    for name in names:
        arguments[name] = _hostile(arguments.get(name), random_)
    return function, arguments, names


def _hostile(good, random_):
    if isinstance(good, torch.Tensor) and random_.random() < 0.6:
        for change in random_.sample(OF_A_TENSOR, 10):
            try:
                return change(good.clone())
            except (RuntimeError, IndexError, TypeError):  # not of this shape or dtype
                continue
    return random_.choice(ANYTHING)()


def name_of(function):
    return f"{function.__module__.split('.')[-1]}.{function.__name__}"


def problem_of(seed, only=""):
    """What is wrong with how a call ends, in words; None if nothing is."""
    function, arguments, names = call_of(seed, only)
    try:
        results = _results(function, arguments)
    except (ValueError, NotImplementedError) as error:
        # Where an argument is left out, others are the wrong ones.
        return _problem_of_error(error, arguments if any(arguments[name] is None for name in names) else names)
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    if not _is_tame(arguments):
        return None
    if any(bool((x.isnan() | (x == torch.inf)).any()) for x in results):
        # Gradients by a log-sum-exp of other scores may be anything.
        return None if "softmax_lse" in arguments else "returns NaN or inf"
    with mock.patch.dict(os.environ, MTLFLASHATTN_KERNEL="torch"):
        reference = _results(*call_of(seed, only)[:2])
    for mine, right in zip(results, reference, strict=True):
        if mine.shape != right.shape or not torch.allclose(mine, right, rtol=2e-2, atol=2e-2):
            return "another result than that of the torch tier"
    return None


def _problem_of_error(error, names):
    message = str(error)
    if not re.search(r"\w: got .*(accepted|supported): |^\w+: attention .* does not support", message, re.DOTALL):
        return f"{type(error).__name__} in other words: {_first_line(error)}"
    said = [name for name in names for name in (name, *_IN_WORDS.get(name, ()))]
    if not any(re.search(rf"(?<!\w){name}(?!\w)", message) for name in said):
        return f"{type(error).__name__} names another argument: {_first_line(error)}"
    return None


def _first_line(error):
    return (str(error).splitlines() or [""])[0][:110]


def _results(function, arguments):
    """What a call returns and what it writes, in float64: all but what has no values."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = function(**arguments)
    tensors = (*(result if isinstance(result, tuple) else (result,)), *arguments.values())
    plain = (x.detach() for x in tensors if isinstance(x, torch.Tensor) and not x.is_nested and not x.is_quantized)
    plain = (x for x in plain if x.layout is torch.strided and not x.is_meta and not x.is_complex())
    return [x.double() for x in plain]


def _is_tame(value):
    """Are all numbers in it finite and of a usual size?"""
    if isinstance(value, dict):
        return all(_is_tame(part) for name, part in value.items() if name not in ("dq", "dk", "dv"))
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_nested or value.is_meta or value.is_quantized:
            return True
        return value.is_complex() or bool((value.detach().double().abs() < TAME).all())
    if isinstance(value, (int, float, np.number)):
        return bool(abs(value) < TAME)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next one has the next seed")
    parser.add_argument("--only", default="", help="a part of the name of a function, such as fa2.flash_attn_func")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    begin, kinds, first, total = time.monotonic(), collections.Counter(), {}, 0
    for seed in range(chosen.seed, chosen.seed + chosen.calls):
        problem = problem_of(seed, chosen.only)
        if problem is not None:
            function, _, names = call_of(seed, chosen.only)
            kind = f"{name_of(function)}({', '.join(names)}): {problem}"
            kinds[kind] += 1
            first.setdefault(kind, seed)
            total += 1
    for kind, count in kinds.most_common():
        print(f"{count:5}  --seed {first[kind]} --calls 1  {kind}")
    print(f"{total} of {chosen.calls} calls end wrong; {time.monotonic() - begin:.0f} s")
    sys.exit(total > 0)


if __name__ == "__main__":
    main()
