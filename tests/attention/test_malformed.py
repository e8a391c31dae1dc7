"""Malformed calls: each is refused, ValueError or NotImplementedError, by the argument's name; none returns."""

import re
from types import SimpleNamespace

import pytest
import torch

from flash_attn_mps.frontends import fa2

from .malformed import TABLES, append, ints

ROWS = [
    pytest.param(function, good, change, named, id=f"{function.__module__.split('.')[-1]}.{good.__name__}: {what}")
    for function, good, rows in TABLES
    for what, change, named in rows
]


@pytest.mark.parametrize(("function", "good"), [row[:2] for row in TABLES])
def test_the_good_call_is_good(function, good):
    """Otherwise the rows below could be refused for a reason of their own."""
    result = function(**good())
    assert torch.isfinite(result[0] if isinstance(result, tuple) else result).all()


@pytest.mark.parametrize(("function", "good", "change", "named"), ROWS)
def test_refused_by_name(function, good, change, named):
    call = good()
    call.update(change(SimpleNamespace(**call)))
    with pytest.raises((ValueError, NotImplementedError)) as refusal:
        function(**call)
    names = (named,) if isinstance(named, str) else named
    message = str(refusal.value)
    assert any(re.search(rf"(?<!\w){name}(?!\w)", message) for name in names), f"{message!r} names none of {names}"


def test_a_refused_append_leaves_the_caches_alone():
    call = append()
    call["cache_seqlens"] = ints(5, 10)
    before = call["k_cache"].clone(), call["v_cache"].clone()
    with pytest.raises(ValueError):
        fa2.flash_attn_with_kvcache(**call)
    assert torch.equal(call["k_cache"], before[0])
    assert torch.equal(call["v_cache"], before[1])


def test_there_are_more_than_a_thousand():
    assert len(ROWS) > 1000
