"""What every adjustment is made with: changes that can be undone, and a journal of what became of each module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PENDING = "is being imported"
APPLIED = "adjusted"

#: Module name -> PENDING, APPLIED, what was set (programs), or why it was left alone.
journal: dict[str, str] = {}


class Misfit(Exception):
    """The library is not what the adjustment was written for."""


class Undo:
    """Sets attributes of modules and classes and items of dicts, and undoes what nobody else has changed since."""

    _ABSENT = object()

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: object) -> None:
        before = vars(owner).get(name, self._ABSENT)

        def step():
            if vars(owner).get(name) is value:
                delattr(owner, name) if before is self._ABSENT else setattr(owner, name, before)

        self._steps.append(step)
        setattr(owner, name, value)

    def set_item(self, mapping: dict[Any, Any], key: object, value: object) -> None:
        before = mapping.get(key, self._ABSENT)

        def step():
            if mapping.get(key) is value:
                mapping.pop(key) if before is self._ABSENT else mapping.update({key: before})

        self._steps.append(step)
        mapping[key] = value

    def then(self, step: Callable[[], object]) -> None:
        """Call `step` too when everything is undone."""
        self._steps.append(step)

    def run(self) -> None:
        while self._steps:
            self._steps.pop()()
