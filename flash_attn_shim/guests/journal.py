"""What was decided for which module, and why: `flash_attn_shim.status()` and `mtlflashattn doctor` list it."""

from __future__ import annotations

#: Module -> {presented name: why the module does not see it}.
hidden: dict[str, dict[str, str]] = {}

#: (file and line of a call, function, what it returns there and why), once each.
calls: dict[tuple[str, str], str] = {}

#: Module or file -> the error with which reading its source failed; nothing is decided for it then.
failures: dict[str, str] = {}


def note_call(where: str, function: str, why: str) -> None:
    calls[where, function] = why
