"""Key-value caches on every tier: pages with entries and left padding, packed queries, queries that do not count."""

import pytest

from tests.attention import test_fa3 as fa3
from tests.attention import test_kvcache as kvcache
from tests.attention.pairwise import case_id

PAGED = [case for case in kvcache.CASES if case["where"].startswith("pages") and "+" in case["where"]]
SMALL = [case for case in PAGED if case["dims"] in ((64, 64), (32, 32))]
PACKED = [  # the kernels serve no attention_chunk
    case for case in fa3.PACKED_CASES if case["where"] == "pages" and not case["chunk"]
]


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("case", SMALL[::2], ids=case_id)
def test_pages_with_entries_and_left_padding(case):
    kvcache.test_against_the_oracle(case)


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("case", PACKED, ids=case_id)
def test_packed_queries(case):
    fa3.packed_queries_against_the_oracle(case)


@pytest.mark.usefixtures("tier", "read_by")
@pytest.mark.parametrize("causal", [False, True])
def test_queries_that_do_not_count(causal):
    fa3.seqused_q_of_dense_queries(causal=causal)
