"""Functions of `flash_attn_mps` as functions of the presented module that has them."""

from __future__ import annotations

import functools
import types
from typing import Any


def rehome(namespace: dict[str, Any]) -> None:
    """Replace the functions of `flash_attn_mps` in the namespace of a module by ones that are defined in it.

    A pickle names a function by its module: made here, it then loads where upstream is installed, and the other way.
    The code stays the same object, and everything that hangs on the function comes along.
    """
    for name, value in namespace.items():
        if isinstance(value, types.FunctionType) and value.__module__.partition(".")[0] == "flash_attn_mps":
            parts = (value.__code__, value.__globals__, value.__name__, value.__defaults__, value.__closure__)
            function = types.FunctionType(*parts)
            function.__kwdefaults__ = value.__kwdefaults__
            for attribute in functools.WRAPPER_ASSIGNMENTS:
                setattr(function, attribute, getattr(value, attribute))
            vars(function).update(vars(value))
            function.__module__ = namespace["__name__"]
            namespace[name] = function
