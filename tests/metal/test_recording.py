"""Steps that are repeated: the third call of a layout is two launches and nothing else, and right."""

import threading

import pytest
import torch

from flash_attn_mps import checks, tiers, trace
from flash_attn_mps.frontends import fa2, fa3
from flash_attn_mps.tiers.metal import compiler, recording, variants
from metal_host import observe
from tests.attention import test_kvcache as kvcache
from tests.attention import test_quantised as quantised
from tests.attention.pairwise import case_id
from tests.compiled import compiled

from .calls import int32


@pytest.fixture(autouse=True)
def _lengths_on_the_device(monkeypatch):
    monkeypatch.setattr(checks, "readable", lambda _tensor: False)
    recording.forget()
    yield
    recording.forget()


@pytest.fixture
def repeats(monkeypatch):
    """The calls that were repeated."""
    seen = []
    repeat = recording.Recording.repeat
    monkeypatch.setattr(recording.Recording, "repeat", lambda *args: seen.append(args) or repeat(*args))
    return seen


def step(q_heads=4, seed=None, **changes):
    """The arguments of a step, new tensors in each call."""
    if seed is not None:
        torch.manual_seed(seed)
    k_cache, v_cache = torch.randn(2, 2, 32, 2, 16).unbind()
    k, v = torch.randn(2, 2, 1, 2, 16).unbind()
    how = {"cache_seqlens": int32([5, 17]), "causal": True, "return_softmax_lse": True}
    return (torch.randn(2, 1, q_heads, 16), k_cache, v_cache, k, v), {**how, **changes}


def run(*args, **how):
    """Of the same values as a call that is not repeated."""
    copies = [x.clone() for x in args]
    recorded = fa2.flash_attn_with_kvcache(*args, **how)
    kept = dict(recording._known)
    recording._known.clear()
    plain = fa2.flash_attn_with_kvcache(*copies, **how)
    recording._known.clear()
    recording._known.update(kept)
    torch.testing.assert_close(recorded, plain)  # copies are aligned otherwise, so products are summed in another order
    assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))
    return recorded


@pytest.mark.parametrize("case", kvcache.CASES[1::14], ids=case_id)
def test_calls_of_all_kinds(case, repeats):
    for _ in range(4):
        kvcache.test_against_the_oracle(case)
    # A number of keys is another one in each step; without an append, leftpad takes an operation.
    other = case["lengths"] == "int" or (case["seqlen_new"] is None and "leftpad" in case["where"])
    assert len(repeats) == (0 if other else 2)


@pytest.mark.parametrize("case", quantised.CASES[3::14], ids=case_id)
def test_quantised_caches(case, repeats):
    for _ in range(3):
        quantised.test_against_the_oracle(case)
    assert len(repeats) == 1


def test_split_keys_with_their_scratch_memory(repeats):
    """Two launches of attention, and memory between them."""
    results = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        q, cache = torch.randn(1, 1, 8, 64), torch.randn(2, 1, 4096, 1, 64)
        with observe(instrumented=False) as launches:
            results.append(fa2.flash_attn_with_kvcache(q, *cache, cache_seqlens=int32([4000]), num_splits=4))
        assert len(launches) == 2
    assert len(repeats) == 1
    assert torch.equal(results[0], results[2])


def test_another_layout_or_option_is_another_step(repeats):
    for _ in range(3):
        run(*step()[0], **step()[1])
    assert len(repeats) == 1
    args, how = step()
    changed = [
        (args, {**how, "causal": False}),
        (args, {**how, "softmax_scale": 0.3}),
        (args, {**how, "window_size": (3, 0)}),
        (args, {**how, "alibi_slopes": torch.ones(4)}),
        (args, {**how, "cache_leftpad": int32([1, 2])}),
        (step(q_heads=2)[0], how),
        ([x.to(torch.float16) for x in args], how),
        ([torch.randn(2, 1, 4, 32)[..., :16], *args[1:]], how),
        ([args[0], torch.randn(3 + args[1].numel())[3:].view(args[1].shape), *args[2:]], how),
        ([args[0], *(x.repeat(1, 2, 1, 1) for x in args[1:3]), *args[3:]], how),
    ]
    for other, options in changed:
        run(*other, **options)
        assert len(repeats) == 1
    run(*args, **how)
    assert len(repeats) == 2


def test_one_tensor_for_two_arguments(repeats):
    """As cache_seqlens for rotary_seqlens: what was recorded holds only where they are one again."""
    cos, sin = torch.randn(2, 64, 8).unbind()

    def call(same, seed):
        args, how = step(seed=seed)
        del how["return_softmax_lse"]
        other = how["cache_seqlens"] if same else int32([3, 1])
        return fa3.flash_attn_with_kvcache(*args, rotary_cos=cos, rotary_sin=sin, rotary_seqlens=other, **how)

    expected = call(True, 0), call(False, 0)
    assert not torch.equal(*expected)
    recording.forget()
    for same in (True, True, False, True):
        assert torch.equal(call(same, 0), expected[0 if same else 1])
    assert len(repeats) == 1


@pytest.mark.parametrize("what", ["trace", "environment", "kernels", "variants", "forward-mode"])
def test_what_was_recorded_is_not_used_where_it_may_not_hold(what, repeats, monkeypatch):
    for _ in range(3):
        args, how = step()
        fa2.flash_attn_with_kvcache(*args, **how)
    assert len(repeats) == 1
    if what == "trace":
        monkeypatch.setattr(trace, "enabled", True)
    elif what == "environment":
        monkeypatch.setenv(tiers.FORCE, "torch")
    elif what == "kernels":
        compiler.clear()
    elif what == "variants":
        variants.forget()
    with torch.autograd.forward_ad.dual_level() if what == "forward-mode" else torch.no_grad():
        fa2.flash_attn_with_kvcache(*args, **how)
    assert len(repeats) == 1
    trace.clear()


def test_a_call_with_other_operations_is_computed_anew(repeats):
    """Slopes of any strides are copied."""
    for _ in range(4):
        args, how = step()
        run(*args, **how, alibi_slopes=torch.randn(4, 2).T)
    assert not repeats


def test_results_have_memory_of_their_own(repeats):
    args, how = step()
    results = [fa2.flash_attn_with_kvcache(*args, **how) for _ in range(4)]
    assert len(repeats) == 2
    assert len({x.data_ptr() for result in results for x in result}) == 8


def test_a_call_that_fails_while_it_is_recorded_has_appended(monkeypatch):
    """As one does that is not."""
    args, how = step()
    fa2.flash_attn_with_kvcache(*args, **how)
    (k_cache, _), k = args[1:3], args[3]
    k_cache.zero_()
    monkeypatch.setattr(tiers, "ORDER", ())
    with pytest.raises(NotImplementedError):
        fa2.flash_attn_with_kvcache(*args, **how)
    assert torch.equal(k_cache[1, 17], k[1, 0])


def test_launches_of_another_thread_are_not_recorded():
    ours = []
    recorder = recording._Recorder()
    with recorder:
        other = threading.Thread(target=lambda: recording.enqueue(lambda *_, **__: ours.append(1), (), (1,), (1,)))
        other.start()
        other.join()
        assert ours == [1]
        recording.enqueue(lambda *_, **__: ours.append(2), (), (1,), (1,))
        assert ours == [1]
        torch.zeros(3)  # an operation: what was held back goes first
        assert ours == [1, 2]


def test_in_a_graph(repeats):
    """The operator of a compiled graph repeats its steps too."""

    def call(q, k_cache, v_cache, k, v, cache_seqlens):
        return fa2.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True)

    steps = [step(seed=seed) for seed in range(4)]
    expected = [call(*(x.clone() for x in args), how["cache_seqlens"]) for args, how in steps]
    recording.forget()
    repeats.clear()
    fast, _ = compiled(call)
    for (args, how), out in zip(steps, expected, strict=True):
        assert torch.equal(fast(*args, how["cache_seqlens"]), out)
    assert len(repeats) == 2
