"""Random calls on every tier and kernel variant, forward and backward, against float64.

    python -m tests.numerics.fuzz --calls 20000 [--seed 0] [--kinds 150]

A kind of call is what a kernel is compiled for (dtype, head dims, storage, features, variant); lengths, heads, strides,
windows, scales and the size of the values vary within it. Prints each wrong call with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from flash_attn_mps import dispatch
from flash_attn_mps.tiers import METAL
from flash_attn_mps.tiers.metal import simdgroup, store, tensorops, variants
from tests.attention import oracle
from tests.mac import mac
from tests.metal.calls import STORAGES, Call, Sequence, Spec, draw
from tests.metal_tiers import decode_serves_all, metal_on

TIERS = ("auto", "torch", "decode", "simdgroup", "scalar", "tensorops")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIMS = ((64, 64), (32, 32), (16, 16), (128, 128), (40, 40), (13, 13), (8, 24), (96, 64), (1, 1))
LAYOUTS = ("contiguous", "transposed", "packed", "strided_last", "offset")
SIZES = (1.0, 1.0, 1.0, 0.0, 1e-3, 8.0, 60.0, 1e3, 1e8)
SAME_QUERIES = ("dense", "cache", "paged-cache")  # storages in which all sequences have as many queries


def kind_of(r: random.Random) -> dict:
    """What a kernel is compiled for."""
    tier = r.choice((*TIERS, "simdgroup", "simdgroup"))
    kernel = tensorops.FORWARD if tier == "tensorops" else simdgroup.FORWARD
    dtype = r.choice((torch.float16, torch.bfloat16) if tier == "tensorops" else DTYPES)
    dims, storage = r.choice(DIMS), r.choice(("dense", "varlen", *STORAGES))
    masks = (None, None, None, "bool", "same", "float32") if storage in SAME_QUERIES else (None,)  # not for packed ones
    return {
        "tier": tier,
        "variant": r.choice(kernel.fitting(dtype.itemsize, *dims)),
        "registers": r.choice(("apple10", "apple10", "legacy", r.randrange(1, 1000))),  # where cooperative tensors lie
        "dtype": dtype,
        "dims": dims,
        "storage": storage,
        "window": r.choice(((0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 1))),  # which sides are closed
        "softcap": r.choice((0.0, 0.0, 0.0, 3.0)),
        "alibi": r.choice((None, None, None, "H", "BH")),
        "sinks": r.random() < 0.2,
        "mask": r.choice(masks),
        "dropout": 0.0 if tier == "decode" else r.choice((0.0, 0.0, 0.3)),
        "scale": r.choice(("number", "number", "float16", "float32")),
        "lse": r.random() < 0.7,
        "layout": tuple(r.choice(LAYOUTS) for _ in range(3)),
    }


def spec_of(kind: dict, r: random.Random) -> Spec:
    """A call of that kind."""
    batch, most = r.choice((1, 1, 2, 3)), r.choice((1, 8, 33, 70))
    queries = [r.randint(0 if kind["storage"] not in SAME_QUERIES else 1, most) for _ in range(batch)]
    if kind["storage"] in SAME_QUERIES:
        queries = queries[:1] * batch
    keys = [r.randint(0, r.choice((3, 40, 90))) for _ in range(batch)]
    if kind["storage"] == "dense":
        keys = [max(1, keys[0])] * batch
    if not sum(queries):
        queries[0] = 1
    if not sum(keys):
        keys[0] = 1
    heads_k = r.choice((1, 2))
    scale = r.choice((None, 0.3, 1.0, -0.2, 0.0))
    if kind["scale"] != "number":
        scale = torch.tensor(0.25 if scale is None else scale, dtype=getattr(torch, kind["scale"]))
    sides = [r.choice((0, 1, 5, 40)) if closed else -1 for closed in kind["window"]]
    largest = 1e4 if kind["dtype"] == torch.float16 else math.inf
    return Spec(
        list(zip(queries, keys, strict=True)),
        kind["dims"],
        kind["dtype"],
        kind["storage"],
        (heads_k * r.choice((1, 2, 4)), heads_k),
        (sides[0], sides[1]),
        kind["softcap"],
        kind["alibi"],
        kind["sinks"],
        kind["mask"],
        r.choice(("", "b", "h", "bh")) + r.choice(("", "", "q", "k", "qk")),
        "columns",
        scale,
        kind["lse"],
        kind["layout"],
        r.choice((math.nan, math.inf)),
        r.choice((1, 16, 50)),
        tuple(min(r.choice(SIZES), largest) for _ in range(3)),
        kind["dropout"],
    )


@contextlib.contextmanager
def served_by(tier: str, variant: NamedTuple, registers: str | int) -> Iterator[None]:
    """The tier computes every call; the Metal ones on the runner, that on tensor operations on an imitated M5."""
    with contextlib.ExitStack() as machine:
        patch = machine.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("MTLFLASHATTN_KERNEL", tier)
        if tier == "tensorops":
            patch.setenv(store.CACHE, machine.enter_context(tempfile.TemporaryDirectory()))
            patch.setenv("METAL_HOST_LAYOUT", str(registers))
            patch.setenv(tensorops.FORWARD.variable, str(variant))
            machine.enter_context(mac())
        else:
            patch.setenv(simdgroup.FORWARD.variable, str(variant))
        variants.forget()
        machine.callback(variants.forget)
        if tier == "decode":
            decode_serves_all(patch)
        if tier in METAL:
            machine.enter_context(metal_on("cpu", version="4.0" if tier == "tensorops" else None))
        yield


def errors(call: Call, gradients: bool, r: random.Random) -> list[str]:
    """What is wrong with the product's answer, in words."""
    p = call.problem
    tensors = {"dq": p.q, "dk": p.k, "dv": p.v}
    if p.mask is not None and p.mask.is_floating_point() and r.random() < 0.5:
        own = tuple(slice(None) if step else slice(1) for step in p.mask.stride())  # not expanded
        tensors["dmask"] = p.mask = p.mask[own]
    for tensor in tensors.values():
        tensor.requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        result = dispatch.attention(p)
    dout = torch.randn(p.out_shape, generator=torch.Generator().manual_seed(r.getrandbits(32))).to(p.q.dtype)
    grads = torch.autograd.grad(result.out, tuple(tensors.values()), dout) if gradients else ()
    grads = dict(zip(tensors, grads, strict=False))
    wrong = []
    read_q, read_k = torch.zeros(p.q.shape[:-2], dtype=torch.bool), torch.zeros(p.k.shape[:-2], dtype=torch.bool)
    of_masks: dict[str, list[torch.Tensor]] = {"exact": [], "plain": [], "rounded": []}
    rounding = 0.0
    for s in call.sequences:
        read_q[s.place], read_k[s.place_k] = True, True
        exact = _computed(s, dout[s.place], torch.float64, None)
        plain = _computed(s, dout[s.place], torch.float32, None)
        rounded = _computed(s, dout[s.place], torch.float64, p.q.dtype)
        got = {"out": result.out.detach()[s.place]}
        places = {"dq": s.place, "dk": s.place_k, "dv": s.place_k}
        got |= {name: grads[name][place] for name, place in places.items() if name in grads}
        if "dmask" in grads:
            rounding += _float32("dmask", s, dout[s.place])
            beyond = (0, p.max_seqlen_k - s.k.shape[0], 0, p.max_seqlen_q - s.q.shape[0])
            for how, computed in (("exact", exact), ("plain", plain), ("rounded", rounded)):
                of_masks[how].append(torch.nn.functional.pad(computed["dmask"], beyond))
        if p.want_lse and result.lse is not None:
            got["lse"] = result.lse.detach().transpose(-1, -2)[s.place]
        for name, value in got.items():
            more = _float32(name, s, dout[s.place])
            why = _differs(value, exact[name], plain[name], rounded[name], name == "lse", more)
            wrong += [f"{name}: {why}"] if why else []
    if "dmask" in grads:
        shape = grads["dmask"].shape
        sums = {how: torch.stack(parts).sum_to_size(shape) for how, parts in of_masks.items()}
        terms = p.batch * p.heads * p.max_seqlen_q * p.max_seqlen_k / shape.numel()  # summed into an element
        why = _differs(grads["dmask"], *sums.values(), False, rounding * terms)
        wrong += [f"dmask: {why}"] if why else []
    if not (result.out[~read_q] == 0).all():
        wrong.append("out: a row of no sequence is not zero")
    for name, read in (("dq", read_q), ("dk", read_k), ("dv", read_k)):
        if name in grads and not (grads[name][~read] == 0).all():
            wrong.append(f"{name}: a row of no sequence has a gradient")
    return wrong


def _computed(s: Sequence, dout: torch.Tensor, number: torch.dtype, rounded_to: torch.dtype | None) -> dict:
    """out, lse and gradients of a sequence, computed in `number`.

    `rounded_to`: the gradients as FlashAttention's formula has them from an output that was rounded to that dtype.
    """
    names, inputs = ["dq", "dk", "dv"], [s.q, s.k, s.v]
    if s.how["mask"] is not None and s.how["mask"].is_floating_point():
        names, inputs = [*names, "dmask"], [*inputs, s.how["mask"]]
    inputs = [x.detach().to(number).requires_grad_() for x in inputs]
    out, lse, _ = oracle.one_sequence(*inputs[:3], **s.how | ({"mask": inputs[3]} if "dmask" in names else {}))
    dout = dout.to(number)
    grads = dict(zip(names, torch.autograd.grad(out, inputs, dout, retain_graph=True), strict=True))
    if rounded_to is not None:
        # delta = rowsum(dout * out) changes with the output, and ds = p (dp - delta) by p times that: as if it were a
        # gradient of lse.
        change = ((out.detach().to(rounded_to).to(number) - out.detach()) * dout).sum(-1).T
        of_scores = [name for name in names if name != "dv"]
        wanted = [x for name, x in zip(names, inputs, strict=True) if name != "dv"]
        more = torch.autograd.grad(lse, wanted, -change.masked_fill(lse.isinf(), 0.0))
        grads |= {name: grads[name] + x for name, x in zip(of_scores, more, strict=True)}
    return {"out": out.detach(), "lse": lse.detach().T, **grads}


def _float32(name: str, s: Sequence, dout: torch.Tensor) -> float:
    """What float32 arithmetic may cost: the rounding of scores, by the order of their sums, and what is left of
    dp - delta, two sums of products of dout and v that are equal where a probability is 1."""
    if not dout.numel() or not s.k.numel():
        return 0.0
    q, k, v = (x.detach().double() for x in (s.q, s.k, s.v))
    scale = s.how["softmax_scale"]
    scale = abs(q.shape[-1] ** -0.5 if scale is None else float(scale))
    scores = min(0.1, 5e-7 * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item() * scale)
    products = dout.double().abs().sum(-1).max().item() * v.abs().max().item()
    queries = dout.shape[0] * (q.shape[1] // k.shape[1])  # that a key's gradient is summed over
    of_scores = {
        "out": 2 * v.abs().max().item(),
        "lse": 1.0,
        "dv": queries * dout.double().abs().max().item(),
        "dq": products * scale * k.abs().max().item(),
        "dk": products * scale * q.abs().max().item() * queries,
        "dmask": products,
    }[name]
    of_scores /= 1.0 if name == "lse" else 1.0 - s.how["dropout_p"]
    return (scores + (2e-6 if name in ("dq", "dk", "dmask") else 0.0)) * of_scores


def _differs(got, exact, plain, rounded, is_lse: bool, more: float) -> str | None:
    """Why a result is wrong; None where its error is that of float32 arithmetic, a rounded output, or its rounding."""
    dtype = torch.finfo(got.dtype)
    got, exact, plain, rounded = (x.double() for x in (got, exact, plain, rounded))
    if not torch.equal(plain.isfinite(), exact.isfinite()):
        return None  # float32 overflows
    finite = exact.isfinite()
    if not finite.any():
        return None if torch.equal(got.isfinite(), finite) else "finite in other places"
    size = exact[finite].abs().max().item()
    allowed = 4 * (plain - exact)[finite].abs().max().item() + 2 * (rounded - exact)[finite].abs().max().item() + more
    allowed += (2e-5 if is_lse else 4 * dtype.eps + 1e-5) * (1 + size)
    if not torch.equal(got.isfinite(), finite):
        return None if size + allowed > dtype.max else "finite in other places"
    error = (got - exact)[finite].abs().max().item()
    return None if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}, size {size:.3g}"


class Found(NamedTuple):
    calls: int
    tiers: Counter
    wrong: list[str]


def fuzz(calls: int, kinds: int, seed: int, note: Callable[[str], object] = lambda _: None) -> Found:
    """Random calls of random kinds; about a third of them with gradients."""
    r = random.Random(seed)
    found = Found(calls, Counter(), [])
    each = -(-calls // kinds)
    for first in range(0, calls, each):
        kind = kind_of(r)
        note(f"{first} calls, {len(found.wrong)} wrong; next: {kind['tier']} {kind['storage']}")
        with served_by(kind["tier"], kind["variant"], kind["registers"]):
            for _ in range(min(each, calls - first)):
                call_seed = r.getrandbits(32)
                why = examine(kind, call_seed)
                found.tiers[kind["tier"]] += 1
                if why:
                    found.wrong.append(f"seed {call_seed}, {kind}: {'; '.join(why)}")
                    note(found.wrong[-1])
    return found


def examine(kind: dict, seed: int) -> list[str]:
    """What is wrong with one call of `kind`."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    spec = spec_of(kind, r)
    try:
        return errors(draw(spec), r.random() < 0.35, r)
    except NotImplementedError as error:
        # A forced kernel is not launched where there is nothing to compute.
        return [] if "there are no scores" in str(error) else [f"NotImplementedError: {error}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--kinds", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    found = fuzz(chosen.calls, chosen.kinds, chosen.seed, lambda text: print(text, flush=True))
    tiers = ", ".join(f"{tier} {count}" for tier, count in found.tiers.items())
    print(f"{found.calls} calls ({tiers}) in {time.monotonic() - began:.0f} s: {len(found.wrong)} wrong")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
