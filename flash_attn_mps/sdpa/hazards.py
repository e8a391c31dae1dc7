"""Calls that a torch release is known to get wrong on MPS: wrong numbers, without an error.

Each is a row: the releases, the ways through torch (`torch_paths.route`) on which it happens, and a condition. Where
the reports leave a limit open, the row is the wider one: such a call is then served by kernels that are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import torch_paths
from .call import Call
from .torch_paths import Version


class Hazard(NamedTuple):
    issue: str  # where it is reported
    what: str  # what goes wrong, in words
    since: Version
    fixed: Version | None  # the first release without it; None: none is known
    routes: tuple[str, ...]
    applies: Callable[[Call], bool]

    def holds(self, release: Version) -> bool:
        """Does that release have it?"""
        return self.since <= release and (self.fixed is None or release < self.fixed)


_ALWAYS: Version = (0, 0)

TABLE = (
    Hazard(
        "pytorch#195910",
        "is_causal in half precision lets queries see keys after them",
        _ALWAYS,
        None,  # gone from 2.13 for the head dims of its fused kernel; the graph that has it still serves the others
        ("general",),
        lambda call: call.causal and call.half,
    ),
    Hazard(
        "pytorch#176767",
        "a head dim of value that differs from that of query gives an output of the wrong shape",
        _ALWAYS,
        (2, 12),
        ("general", "vector"),
        lambda call: call.head_dim != call.head_dim_v,
    ),
    Hazard(
        "pytorch#179352",
        "a score matrix of 2^31 elements or more is computed with indices that overflow",
        _ALWAYS,
        None,  # pytorch#197636 sees it in every release up to 2.14, ComfyUI#14837 from 2^31 elements on
        torch_paths.MATERIALIZED,
        lambda call: call.scores >= 1 << 31,
    ),
    Hazard(
        "pytorch#190791",
        "the softmax of more than 3068 keys in half precision loses digits",
        _ALWAYS,
        None,
        ("general",),
        lambda call: call.half and call.seqlen_k > 3068,
    ),
    Hazard(
        "pytorch#160841",
        "scores beyond the range of float16 overflow before they are scaled and give NaN or garbage",
        _ALWAYS,
        (2, 10),  # pytorch#165961
        ("general",),
        lambda call: call.dtype == torch.float16,
    ),
    Hazard(
        "pytorch#156707",
        "a query that the mask hides from all keys gives NaN",
        _ALWAYS,
        (2, 9),
        ("general",),
        lambda call: call.mask != "none",
    ),
    Hazard(
        "pytorch#174861",
        "few queries against 1024 keys or more in half precision read and write outside their buffers",
        (2, 8),
        (2, 11),
        ("vector",),
        lambda call: call.half and call.seqlen_k >= 1024,
    ),
    Hazard(
        "pytorch#169222",
        "few queries against a number of keys that is no multiple of 32 read keys that are not there",
        (2, 8),
        (2, 11),
        ("vector",),
        lambda call: call.seqlen_k % 32 != 0,
    ),
    Hazard(
        "pytorch#181133",  # 2.8 without a batch too: pytorch#163597
        "few queries that are a transposed view are read with the wrong strides",
        (2, 8),
        (2, 12),
        ("vector",),
        lambda call: call.transposed,
    ),
    Hazard(
        "pytorch#182285",
        "few queries with a boolean mask are masked wrongly",
        _ALWAYS,
        (2, 12),
        ("vector",),
        lambda call: call.mask == "bool",
    ),
    Hazard(
        "pytorch#184180",
        "few queries with a mask that heads share get the mask of another batch entry",
        _ALWAYS,
        (2, 13),
        ("vector",),
        lambda call: "b" in call.mask_varies and "h" not in call.mask_varies,
    ),
)


def hazards(call: Call, release: Version) -> list[Hazard]:
    """Those that `call` meets under that release of torch."""
    way = torch_paths.route(call, release)
    return [hazard for hazard in TABLE if hazard.holds(release) and way in hazard.routes and hazard.applies(call)]
