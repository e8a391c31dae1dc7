"""Eight sequences decoded token by token on the decode kernel: the tokens of the torch tier, whatever the cache."""

import json

import pytest
from conftest import start

LAYERS, NEW = 2, 6


@pytest.fixture(scope="module")
def generated():
    printed = start("generating.py", "torch", "metal", MTLFLASHATTN_SHIM="on")
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("kind", ["dynamic", "static", "padded"])
def test_tokens_are_those_of_the_torch_tier(generated, kind):
    expected, found = generated["torch"][kind], generated["metal"][kind]
    assert expected["served"] == {"torch": LAYERS * NEW}
    assert found["served"] == {"simdgroup": LAYERS, "decode": LAYERS * (NEW - 1)}
    assert found["tokens"] == expected["tokens"]
    assert len({tuple(tokens) for tokens in found["tokens"]}) == 8
