"""Real weights: `flash_attention_2` ranks 200 real sentences as "eager" does."""

import json

import numpy
import pytest
import transformers
from conftest import start

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="before 5.x, transformers' BERT has no FlashAttention 2"
)


@pytest.fixture(scope="module")
def ranked():
    return json.loads(start("ranking.py", MTLFLASHATTN_SHIM="on", TOKENIZERS_PARALLELISM="false").splitlines()[-1])


def scores(ranked, dtype, attention):
    return numpy.array(ranked["dtypes"][dtype][attention]["scores"])


def order(values):
    return numpy.argsort(-values, axis=1, kind="stable")


def test_the_sentences_are_200_and_attention_was_called(ranked):
    assert len(set(ranked["sentences"])) == 200
    for dtype in ranked["dtypes"].values():
        assert dtype["eager"]["calls"] == 0
        assert dtype["flash_attention_2"]["calls"] >= 12  # six layers, queries and sentences


def test_the_order_is_the_same_in_float32(ranked):
    eager, flash = (scores(ranked, "float32", attention) for attention in ("eager", "flash_attention_2"))
    numpy.testing.assert_array_equal(order(flash), order(eager))
    assert numpy.abs(flash - eager).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_order_is_the_same_but_for_what_rounding_decides(ranked, dtype):
    """Rounding alone moves each score of eager attention by up to `noise` from what it is in float32. Two sentences may
    change places only if eager attention has them closer than both can move; flash attention moves nothing further."""
    exact = scores(ranked, "float32", "eager")
    eager, flash = (scores(ranked, dtype, attention) for attention in ("eager", "flash_attention_2"))
    noise = numpy.abs(eager - exact).max()
    assert numpy.abs(flash - exact).max() <= 1.5 * noise
    for of_eager, of_flash in zip(eager, flash, strict=True):
        gap = of_eager[:, None] - of_eager[None]
        swapped = (gap > 0) & (of_flash[:, None] - of_flash[None] < 0)
        assert gap[swapped].max(initial=0.0) <= 2 * noise
        # Far from all pairs are that close: the rule says something.
        assert (gap > 2 * noise).sum() > 0.8 * len(of_eager) * (len(of_eager) - 1) / 2
