"""`help()` of the public functions: every argument, the masks that it draws, what is returned and raised, examples."""

import doctest
import inspect
import pydoc
import re
import typing

import pytest
import torch

import flash_attn
import flash_attn_interface
import flash_attn_mps

FA2 = [getattr(flash_attn, name) for name in flash_attn.__all__]
FA3 = [getattr(flash_attn_interface, name) for name in flash_attn_interface.__all__]
FUNCTIONS = [*FA2, *FA3, flash_attn_mps.flash_attention]

functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f"{f.__module__}.{f.__name__}")


def sections(function):
    """The docstring's sections, by their headings; what stands before the first one is under ""."""
    parts = re.split(r"^(\w+):$", inspect.getdoc(function), flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[0::2], strict=True))


def described(function):
    """`{argument: what help says of it}`."""
    entries = re.split(r"^    (\w+): ", sections(function)["Args"], flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}


@functions
def test_each_argument_is_described_in_order(function):
    entries = described(function)
    assert list(entries) == list(inspect.signature(function).parameters)
    hollow = {name for name, text in entries.items() if len(text) < 10}
    assert not hollow


@functions
def test_tensors_have_a_shape_and_numbers_a_meaning(function):
    for name, annotation in typing.get_type_hints(function).items():
        if annotation in (torch.Tensor, torch.Tensor | None) and name != "return":
            text = described(function)[name]
            assert re.search(r"`\([^`]*\)`|shape of|likewise|instead of|no effect|None: ", text), (name, text)


@functions
def test_returns_raises_and_an_example_are_there(function):
    parts = sections(function)
    assert {"Args", "Returns", "Raises", "Example"} <= parts.keys()
    asks = {"return_attn_probs", "return_softmax_lse"} & inspect.signature(function).parameters.keys()
    for name in asks:
        assert f"`{name}`, the tuple `(out, softmax_lse" in parts["Returns"]


@functions
def test_the_example_runs(function):
    (test,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert test.examples
    told = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    assert results.attempted and not results.failed, "".join(told)


@pytest.mark.parametrize("family", [FA2, FA3], ids=["FlashAttention 2", "FlashAttention 3"])
@pytest.mark.parametrize(
    "name", ["softcap", "dropout_p", "deterministic", "num_splits", "pack_gqa", "sm_margin", "q_descale"]
)
def test_an_option_that_means_the_same_is_explained_in_the_same_words(family, name):
    attention = [f for f in family if "softmax_scale" in inspect.signature(f).parameters]
    explained = {described(f)[name] for f in attention if name in inspect.signature(f).parameters}
    # Where the words go on, they begin alike: `dropout_p` has a second sentence in the first function.
    assert all(text.startswith(min(explained, key=len)) for text in explained)


# What the drawings say, and what the functions do.


def drawings(function):
    """`[(the rule and the lengths, the drawn mask)]`, of drawings that stand side by side."""
    lines = inspect.getdoc(function).splitlines()
    for at, line in enumerate(lines):
        if re.match(r" +seqlen\w*=", line):
            starts = [m.start() for m in re.finditer(r"seqlen(_q)?=", line)]
            for begin, end in zip(starts, [*starts[1:], None], strict=True):
                column = [other[begin:end].strip() for other in lines[at : lines.index("", at)]]
                lengths, rule, *rows = [text for text in column if text]
                given = eval(f"dict({lengths})"), eval(f"dict({rule})")
                yield *given, torch.tensor([[key == "x" for key in row.split()] for row in rows])


def visible(function, lengths, rule):
    """Which keys reach which queries: value j is one in column j alone."""
    seqlen_q = lengths.get("seqlen_q", lengths.get("seqlen"))
    seqlen_k = lengths.get("seqlen_k", seqlen_q)
    q, k, v = torch.zeros(seqlen_q, 1, seqlen_k), torch.zeros(seqlen_k, 1, seqlen_k), torch.eye(seqlen_k)[:, None]
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (seqlen_q, seqlen_k))
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "kv": torch.stack([k, v], 1),
        "qkv": torch.stack([q, k, v], 1) if seqlen_q == seqlen_k else None,
        "query": q.transpose(0, 1),
        "key": k.transpose(0, 1),
        "value": v.transpose(0, 1),
        "k_cache": k,
        "v_cache": v,
    }
    lengths_of = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "cu_seqlens": cu_q,
        "max_seqlen_q": seqlen_q,
        "max_seqlen_k": seqlen_k,
        "max_seqlen": seqlen_q,
    }
    required = [n for n, p in inspect.signature(function).parameters.items() if p.default is inspect.Parameter.empty]
    packed = "varlen" in function.__name__
    given = [lengths_of[n] if n in lengths_of else arguments[n] if packed else arguments[n][None] for n in required]
    out = function(*given, **rule)
    if function is flash_attn_mps.flash_attention:
        out = out.transpose(1, 2)
    return out.reshape(seqlen_q, seqlen_k) > 0


@functions
def test_the_drawn_masks_are_what_is_computed(function):
    drawn, parameters = list(drawings(function)), inspect.signature(function).parameters
    if {"q", "qkv"} & parameters.keys():
        assert any("causal" in rule for _, rule, _ in drawn) and any("window_size" in rule for _, rule, _ in drawn)
    if {"q", "query"} & parameters.keys():  # and keys of another length
        lengths = [lengths for lengths, rule, _ in drawn if "causal" in str(rule)]
        assert lengths == [{"seqlen_q": 2, "seqlen_k": 5}, {"seqlen_q": 5, "seqlen_k": 2}]
    for lengths, rule, mask in drawn:
        assert torch.equal(visible(function, lengths, rule), mask), (lengths, rule)


# As users see it.


def test_help_prints_it_without_a_detour():
    text = pydoc.render_doc(flash_attn.flash_attn_func, renderer=pydoc.plaintext)
    for words in ("Tensor", "bottom right", "x x x x .", "window_size: two ints", "softmax_lse", "ValueError", ">>> "):
        assert words in text


@pytest.mark.parametrize("module", [flash_attn, flash_attn_interface, flash_attn.flash_attn_interface])
def test_the_module_says_what_it_is_and_where_the_semantics_are(module):
    first, *_ = module.__doc__.splitlines()
    assert "FlashAttention" in first
    assert "mtlflashattn" in module.__doc__ and "help(" in module.__doc__


@functions
def test_annotations_are_complete_and_can_be_evaluated(function):
    hints = typing.get_type_hints(function)
    assert hints.keys() == {*inspect.signature(function).parameters, "return"}
