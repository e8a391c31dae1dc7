"""Records as arguments of operators: the schema follows from how the fields of a dataclass are annotated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

# A field that may be a number or a tensor is two arguments, one of which is None.
_TYPES = {
    "torch.Tensor": ("Tensor {}",),
    "torch.Tensor | None": ("Tensor? {}",),
    "int": ("SymInt {}",),
    "float": ("float {}",),
    "bool": ("bool {}",),
    "bool | None": ("bool? {}",),
    "str": ("str {}",),
    "Sequence[int] | torch.Tensor": ("SymInt[] {}",),
    "int | torch.Tensor": ("SymInt? {}", "Tensor? {}_tensor"),
    "float | torch.Tensor": ("float? {}", "Tensor? {}_tensor"),
    "int | torch.Tensor | None": ("SymInt? {}", "Tensor? {}_tensor"),
    "float | torch.Tensor | None": ("float? {}", "Tensor? {}_tensor"),
}
Fields = list[tuple[str, tuple[str, ...]]]


def fields_of(record: type, *without: str) -> Fields:
    """The fields of a dataclass, `without` some, and the arguments that each becomes."""
    fields = []
    for field in dataclasses.fields(record):
        if field.name not in without:
            if field.type not in _TYPES:
                raise TypeError(f"{record.__name__}.{field.name}: no operator's argument is known for {field.type}")
            fields.append((field.name, _TYPES[field.type]))
    return fields


def schema_of(fields: Fields) -> str:
    return ", ".join(part.format(name) for name, parts in fields for part in parts)


def flatten(fields: Fields, value: Any) -> list[Any]:
    """The arguments that stand for `value`, in the order of the schema."""
    arguments: list[Any] = []
    for name, parts in fields:
        field = getattr(value, name)
        if len(parts) == 1:
            arguments.append(field)
        else:
            arguments.extend((None, field) if isinstance(field, torch.Tensor) else (field, None))
    return arguments


def unflatten(fields: Fields, arguments: Iterator[Any]) -> dict[str, Any]:
    """The fields by name, from the next `arguments`."""
    values = {}
    for name, parts in fields:
        values[name] = next(arguments)
        if len(parts) == 2:
            tensor = next(arguments)
            values[name] = values[name] if tensor is None else tensor
    return values
