"""PyTorch's own attention on MPS, served by this package where torch is wrong, has no room for it, or is slower.

    from flash_attn_mps import sdpa

    sdpa.install()                      # calls of scaled_dot_product_attention on MPS come here from now on
    with sdpa.installed(): ...          # or for a while
    print(sdpa.explain(q, k, v, is_causal=True))
    print(sdpa.stats())

`MTLFLASHATTN_SDPA=on` installs it when `flash_attn_mps` is imported. Never on by default. docs/sdpa.md has the rules,
`hazards.TABLE` the calls that torch releases are known to get wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import trace
from . import counters, serve
from .call import Arguments
from .counters import stats
from .decision import Decision, Reason
from .registration import install, installed, is_installed, scaled_dot_product_attention, uninstall
from .serve import reset
from .settings import SWITCH, wanted
from .torch_paths import version

__all__ = [
    "SWITCH",
    "Decision",
    "Reason",
    "explain",
    "install",
    "installed",
    "is_installed",
    "reset",
    "scaled_dot_product_attention",
    "stats",
    "uninstall",
    "wanted",
]


def explain(*args: Any, torch_version: str | None = None, **kwargs: Any) -> Decision:
    """The decision about this call of `scaled_dot_product_attention`, and its reasons; nothing is computed.

    Tensors on the "meta" device count as on MPS. `torch_version`, like "2.10.0": as it would be with that release.
    Raises TypeError where arguments are missing.
    """
    given = serve.current()
    if torch_version is not None:
        given = replace(given, torch=version(torch_version))
    return serve.examine(Arguments(*args, **kwargs), given, as_if=True)[0]


trace.at_exit.append(counters.table)
