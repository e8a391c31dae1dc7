"""The project itself, as messages speak of it: where to report a fault, and who owns the distribution's name."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "mtlflashattn"

#: Where to report. The project has no public address yet; this is the one place to write it.
ISSUES = "this project's issue tracker"


def please_report(command: str) -> str:
    """The sentence that asks for a report with the output of a subcommand of `mtlflashattn`."""
    return f"Please report this in {ISSUES}, with the output of `mtlflashattn {command}`."


def name_taken() -> str | None:
    """What to say if the installed distribution of our name is another project's; None if it is ours or absent.

    PyPI has one (facts in `flash_attn_shim/owners.py`). Costs 0.2 ms, beside the second that `import torch` takes.
    """
    try:
        found = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    if any(entry.value.startswith("flash_attn_shim.") for entry in found.entry_points):
        return None
    return (
        f"the installed distribution {DISTRIBUTION} {found.version} ({found.locate_file('')}) is another project of "
        f"the same name; this flash_attn_mps ({__file__.rpartition('flash_attn_mps')[0]}) does not belong to it. "
        f"`python -m flash_attn_shim doctor` says more."
    )
