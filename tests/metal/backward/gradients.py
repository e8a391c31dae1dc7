"""Gradients of the calls of `calls.py`, and what the oracle says of them."""

from __future__ import annotations

import math

import torch

from flash_attn_mps.problem import DIFFERENTIABLE
from flash_attn_mps.tiers.metal import backward
from flash_attn_mps.tiers.metal.backward_kernels import Variant
from tests.attention import oracle
from tests.attention.layouts import laid_out
from tests.attention.rule import assert_within_rule, largest
from tests.metal.calls import Call

QUERIES, KEYS = Variant(8, 2, 8, False, True, False), Variant(8, 2, 8, False, True, False)


class Backward:
    """A call, the gradients of its results, and those of its tensors."""

    def __init__(self, call: Call, *, dlse: bool = False, layout: str = "contiguous", std: float = 1.0):
        """`layout`: of dout, a name of `layouts.py`. Rows of dout that are no queries hold NaN."""
        p = call.problem
        self.call = call
        result = call.expected(torch.float32)
        self.out, self.lse = result.out.to(p.q.dtype), result.lse
        dout = torch.randn(p.out_shape).mul_(std).to(p.q.dtype)
        if layout == "expanded":
            dout = laid_out(dout, layout)
        else:
            rows = torch.zeros(p.q.shape[:-2], dtype=torch.bool)
            for s in call.sequences:
                rows[s.place] = True
            dout = laid_out(dout.masked_fill(~rows[..., None, None], math.nan), layout)
        self.dout = dout
        self.dlse = torch.randn(p.lse_shape) if dlse else None

    @property
    def names(self) -> list[str]:
        """Of the tensors whose gradient Metal computes."""
        tensors = {name: getattr(self.call.problem, name) for name in DIFFERENTIABLE}
        return [name for name, t in tensors.items() if t is not None and t.is_floating_point()]

    def expected(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The oracle's gradients, computed in `dtype`."""
        p = self.call.problem
        leaves = {name: torch.zeros(getattr(p, name).shape, dtype=dtype) for name in ("q", "k", "v")}
        for s in self.call.sequences:
            leaves["q"][s.place] = s.q.to(dtype)
            leaves["k"][s.place_k], leaves["v"][s.place_k] = s.k.to(dtype), s.v.to(dtype)
        if p.sinks is not None:
            leaves["sinks"] = p.sinks.to(dtype).clone()
        if "mask" in self.names:
            leaves["mask"] = p.mask.to(dtype).clone()
        for leaf in leaves.values():
            leaf.requires_grad_()
        whole = (p.batch, p.heads, p.max_seqlen_q, p.max_seqlen_k)
        mask = leaves["mask"].expand(whole) if "mask" in leaves else None
        total = sum(leaf.nan_to_num(0.0, 0.0, 0.0).sum() * 0.0 for leaf in leaves.values())
        for b, s in enumerate(self.call.sequences):
            how = {**s.how, "sinks": leaves.get("sinks")}
            if mask is not None:
                how["mask"] = mask[b, :, : s.q.shape[0], : s.k.shape[0]]
            out, lse, _ = oracle.one_sequence(
                leaves["q"][s.place], leaves["k"][s.place_k], leaves["v"][s.place_k], **how
            )
            total = total + (out * self.dout[s.place].to(dtype)).sum()
            if self.dlse is not None:
                dlse = self.dlse.transpose(-1, -2)[s.place].T.to(dtype)
                total = total + torch.where(lse.isneginf(), 0.0, lse * dlse).sum()
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    def run(self, queries=QUERIES, keys=KEYS, each_head=False, names=None) -> dict[str, torch.Tensor]:
        """Metal's."""
        needed = frozenset(self.names if names is None else names)
        made = backward.compute(
            self.call.problem, self.out, self.lse, self.dout, self.dlse, needed, queries, keys, each_head
        )
        assert made is not None
        return {name: grad for name, grad in zip(DIFFERENTIABLE, made, strict=True) if grad is not None}

    def check(self, got: dict[str, torch.Tensor]) -> None:
        """The rule, for each gradient apart. One of a sink is float32, whatever the dtype of q."""
        exact, plain = self.expected(torch.float64), self.expected(self.call.problem.q.dtype)
        assert set(got) == set(exact)
        for name, grad in got.items():
            assert grad.is_contiguous()
            assert_within_rule("d" + name, grad, plain[name].to(grad.dtype), exact[name])

    def of_the_rule(self, got: dict[str, torch.Tensor]) -> float:
        """The largest error, as a part of what the rule allows."""
        exact, plain = self.expected(torch.float64), self.expected(self.call.problem.q.dtype)
        return max(
            largest(got[n].double() - exact[n]) / (2 * largest(plain[n].double() - exact[n]) + 1e-5) for n in got
        )
