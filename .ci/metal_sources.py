"""Write the Metal source of each specialization of a fixed list to a file, for Apple's compiler to read.

    python .ci/metal_sources.py FOLDER

The list: the calls of `mtlflashattn selftest --quick`, forward and backward, some calls for every usual head dim, and
calls that append to a cache. Tensors are on the CPU and nothing is compiled or computed, so this runs anywhere.
`.ci/compile_metal FOLDER` hands the files to `xcrun metal`.
"""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch

from flash_attn_mps.frontends import fa2
from flash_attn_mps.tiers import BY_NAME
from flash_attn_mps.tiers.metal import compiler, simdgroup, tensorops, tensorops_gate, tensorops_probe
from flash_attn_mps.tiers.metal.specialization import Specialization
from flash_attn_mps.tools.selftest import run
from flash_attn_mps.tools.selftest.cases import DTYPES, Case, cases

FEATURES = ("full", "packed, everything", "bool mask", "gradients, causal")  # for every usual head dim


def listed() -> Iterator[Case]:
    """The cases of the self-test that the list consists of."""
    yield from cases("quick", True)
    usual = [case for case in cases("usual", True) if case.feature in FEATURES]
    yield from usual
    for case in usual:  # this machine has no tensor operations, so the self-test has no cases of them here
        if case.tier == simdgroup.TIER.name and case.dtype != "float32" and not case.variant:
            yield case._replace(tier=tensorops.TIER.name)


def specializations(chosen: Iterable[Case]) -> list[Specialization]:
    """What these cases, and calls with a cache, ask the compiler for, each once."""
    asked: dict[Specialization, None] = {}

    def kernel(specialization: Specialization) -> Callable[..., None]:
        asked[specialization] = None
        return lambda *_, **__: None

    def reach(case: Case) -> None:
        outcome = run.run(case, "cpu")  # of memory that nobody wrote: wrong
        assert outcome.status in (run.RIGHT, run.WRONG, run.NOT_SERVED), outcome

    with mock.patch.multiple(compiler, kernel=kernel, device_types=frozenset({"cpu"})):
        for case in chosen:
            if case.tier == tensorops.TIER.name:
                for layout in tensorops_probe.LAYOUTS:
                    with has_tensor_operations(layout):
                        reach(case)
            elif BY_NAME[case.tier].metal:
                reach(case)
        for dtype in DTYPES:
            with_cache(getattr(torch, dtype))
    return list(asked)


@contextlib.contextmanager
def has_tensor_operations(layout: str) -> Iterator[None]:
    """A machine on which a probe found that layout."""
    with (
        mock.patch.multiple(tensorops_gate, unmet=tuple, unsuited=tuple),
        mock.patch.object(tensorops_probe, "layout", lambda: layout),
    ):
        yield


def with_cache(dtype: torch.dtype) -> None:
    """One new token and a prompt, appended and rotated; the cache is long enough for its keys to be split."""
    caches = [torch.zeros(2, 4096, 2, 64, dtype=dtype) for _ in range(2)]
    tables = [torch.zeros(4096, 32, dtype=dtype) for _ in range(2)]
    lengths = torch.tensor([7, 4000], dtype=torch.int32)
    for new in (1, 40):
        q, k, v = (torch.zeros(2, new, heads, 64, dtype=dtype) for heads in (4, 2, 2))
        fa2.flash_attn_with_kvcache(q, *caches, k, v, *tables, cache_seqlens=lengths, causal=True)


def name_of(specialization: Specialization) -> str:
    """Of its file: what a reader looks for, a digest of the rest, and whether it is written in Metal 4."""
    s = specialization
    digest = hashlib.sha256(s.source().encode()).hexdigest()[:10]
    kind = ".metal4" if "metal_tensor" in s.kernel.headers else ""
    return f"{s.kernel.entry}-{s.dtype}-{s.head_dim}x{s.head_dim_v}-{digest}{kind}.metal"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = {name_of(s): s for s in specializations(listed())}
    for name, specialization in found.items():
        (folder / name).write_text(specialization.source(), encoding="ascii")
    probe = tensorops_probe.PROBE
    (folder / f"{probe.kernel.entry}-.metal4.metal").write_text(probe.source(), encoding="ascii")
    print(f"{len(found)} sources in {folder}, of {', '.join(sorted({s.kernel.entry for s in found.values()}))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
