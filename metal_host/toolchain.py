"""clang and the linker of the PyPI wheel `ziglang`: no system package, no SDK."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from .errors import MetalSyntaxError

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
RUNTIME = HERE / "runtime"

# C++ for OpenCL shares Metal's address spaces. It has no double here, and unsuffixed literals are float, as in Metal.
_EXTENSIONS = (
    "+cl_khr_fp16,-cl_khr_fp64,-__opencl_c_fp64,+__opencl_c_generic_address_space,"
    "+__opencl_c_program_scope_global_variables,+__cl_clang_function_pointers"
)
LANGUAGE = [
    *(
        "-x",
        "clcpp",
        "-cl-std=clc++2021",
        "-cl-no-stdinc",
        "-Xclang",
        f"-cl-ext={_EXTENSIONS}",
        "-cl-single-precision-constant",
    ),
    *("-I", str(INCLUDE / "msl"), "-include", "prelude.h", "-fsigned-char", "-ffp-contract=off", "-fvisibility=hidden"),
    *(
        "-Werror=return-type",
        "-Werror=unknown-attributes",
        "-Wno-unused",
        "-Wno-unknown-pragmas",
    ),
    *("-Wno-pass-failed", "-Wno-keyword-compat", "-fno-caret-diagnostics", "-ferror-limit=20"),
]


@cache
def zig() -> str:
    """The zig binary, which holds clang and lld."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise RuntimeError("compiling Metal sources needs the PyPI package 'ziglang' (pip install ziglang)")
    return str(Path(spec.origin).parent / "zig")


@cache
def version() -> str:
    """The compiler's version, or "none" on a machine that only runs what another compiled."""
    try:
        return importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def digest() -> str:
    """A hash of everything of the runner that shapes a compiled kernel."""
    h = hashlib.sha256()
    files = [*HERE.glob("*.py"), *RUNTIME.iterdir(), *(p for p in INCLUDE.rglob("*") if p.is_file())]
    for path in sorted(files):
        h.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return h.hexdigest()


@cache
def target() -> list[str]:
    """Compiler flags for this machine's CPU."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    if machine not in ("x86_64", "aarch64"):
        raise RuntimeError(f"the CPU back end knows x86_64 and aarch64, this machine is {platform.machine()}")
    if sys.platform == "darwin":
        return ["-target", f"{'arm64' if machine == 'aarch64' else machine}-apple-macos13"]
    flags = ["-target", f"{machine}-unknown-linux-gnu"]
    if machine == "x86_64":
        # Not -march=native: a cache may move between machines of one continuous integration.
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        flags.append("-march=x86-64-v3" if {"avx2", "f16c", "fma"} <= set(cpu.split()) else "-march=x86-64")
    return flags


def run(arguments: list[str], input: str | None = None) -> str:
    """Run zig; its standard output. A failure is RuntimeError with the log."""
    done = subprocess.run([zig(), *arguments], input=input, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"zig {arguments[0]} failed:\n{done.stderr.strip()}")
    return done.stdout


def clang(arguments: list[str], input: str | None = None) -> str:
    """Run clang on a Metal source; its standard output. What it refuses is a MetalSyntaxError in Metal's words."""
    return clang_with_log(arguments, input)[0]


def clang_with_log(arguments: list[str], input: str | None) -> tuple[str, str]:
    """As clang, with the warnings."""
    done = subprocess.run([zig(), "clang", *arguments], input=input, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MetalSyntaxError(in_metal(done.stderr))
    return done.stdout, in_metal(done.stderr)


def clang_log(arguments: list[str], input: str) -> str:
    """What clang says of a source, whether it takes it or not."""
    done = subprocess.run([zig(), "clang", *arguments], input=input, capture_output=True, text=True, check=False)
    return in_metal(done.stderr)


_SPELLING = [
    (re.compile(r"__mh_make<(.*?)>\("), r"\1("),
    (re.compile(r"\b__global\b"), "device"),
    (re.compile(r"\b__local\b"), "threadgroup"),
    (re.compile(r"\b__private\b"), "thread"),
    (re.compile(r"\b__constant\b"), "constant"),
    (re.compile(r"\b__mh_atomic_"), "atomic_"),
    (re.compile(r"__bf16\b"), "bfloat"),
    (re.compile(r"\bclang: "), ""),
]


def in_metal(log: str) -> str:
    """A log of clang's in the words of the source that the user wrote."""
    for pattern, replacement in _SPELLING:
        log = pattern.sub(replacement, log)
    return log.strip()
