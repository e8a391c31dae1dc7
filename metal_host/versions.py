"""Versions of the Metal Shading Language, and what each lacks. torch takes 3.0 to 4.0, by macOS."""

from __future__ import annotations

VERSIONS = ("3.0", "3.1", "3.2", "4.0", "4.1")
DEFAULT = "3.1"


def check(version: str) -> str:
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    return version


def macros(version: str) -> dict[str, int]:
    """What the compiler defines."""
    major, minor = version.split(".")
    defined = {"__METAL__": 1, "__METAL_MACOS__": 1, "__METAL_VERSION__": 100 * int(major) + 10 * int(minor)}
    defined["__HAVE_SIMDGROUP_MATRIX__"] = 1
    if version != "3.0":
        defined["__HAVE_BFLOAT__"] = 1
    if major == "4":
        defined["__HAVE_TENSOR__"] = 1
    return defined


def absent_words(version: str) -> dict[str, str]:
    """Words that an older version does not know, and why."""
    if version != "3.0":
        return {}
    words = ["bfloat", *(f"bfloat{n}" for n in (2, 3, 4)), "simdgroup_bfloat8x8"]
    return {word: f"Metal 3.0 has no {word}" for word in words}


def has_lambdas(version: str) -> bool:
    return version >= "3.2"


def has_generic_this(version: str) -> bool:
    """Member functions without an address space take every one; before, they are `thread`."""
    return version >= "4.1"


def flags(version: str) -> list[str]:
    """C++14; from 3.2 on Apple's compiler also takes what C++17 added, and 4.0 is C++17."""
    if version >= "3.2":
        return ["-Wno-c++17-extensions", "-Wno-pre-c++17-compat"]
    return ["-Werror=pre-c++17-compat", "-Werror=c++17-extensions"]
