"""Compile a Metal source, list its kernels, run one and say what it did wrong: python -m metal_host --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import KernelFault, ShaderLibrary, compile_shader, observe, versions
from .kernels import Buffer

_DTYPES = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat": torch.bfloat16,
    "long": torch.int64,
    "int": torch.int32,
    "short": torch.int16,
    "char": torch.int8,
    "uchar": torch.uint8,
    "bool": torch.bool,
}
_FILLS = ("zeros", "ones", "arange", "rand", "randn")
_EXAMPLES = """arguments of --arg, one for each buffer in order:
  zeros:float:100  ones:half:4x8  arange:int:10  rand:float:64  randn:bfloat:2x3   a tensor: what is in it, type, shape
  3  3:int  0.5  1,2,3     numbers, inline: an integer is 64 bits unless a type is named
  -                        nothing, for a buffer that a function constant takes away

  python -m metal_host scale.metal
  python -m metal_host scale.metal --run scale --arg arange:float:8 --arg 2.0 --threads 8"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m metal_host",
        description="Compile a Metal source on this machine and list its kernels, or run one with every access checked.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a .metal source")
    parser.add_argument("-I", dest="include", action="append", default=[], metavar="FOLDER", help="where headers are")
    parser.add_argument("--version", default=versions.DEFAULT, choices=versions.VERSIONS, help="of the language")
    parser.add_argument("--constant", action="append", default=[], metavar="NAME=VALUE", help="a function constant")
    parser.add_argument("--run", metavar="KERNEL")
    parser.add_argument("--arg", action="append", default=[], metavar="VALUE", help="see below")
    parser.add_argument("--threads", metavar="N[,N[,N]]", help="of the grid; default: elements of the first tensor")
    parser.add_argument("--group", metavar="N[,N[,N]]", help="threads of a threadgroup")
    parser.add_argument(
        "--threadgroup", action="append", default=[], metavar="N=BYTES", help="a [[threadgroup(n)]] length"
    )
    parser.add_argument("--seed", type=int, default=0, help="another order of the threads")
    parser.add_argument("--lockstep", action="store_true", help="lanes of a simdgroup advance together")
    parser.add_argument(
        "--layout",
        type=lambda text: int(text) if text.isdecimal() else text,
        help="of cooperative tensors: a name or seed",
    )
    parser.add_argument("--partial", action="store_true", help="allow reductions that some lanes do not reach")
    parser.add_argument("--fast", action="store_true", help="without the checks")
    parser.add_argument("--resources", action="store_true", help="registers and spills on an NVIDIA GPU, by ptxas")
    return parser


def _number(text: str) -> bool | int | float:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text, 0)
    except ValueError:
        return float(text)


def _argument(text: str) -> tuple[object, str | None]:
    """The value of an --arg, and what torch's arg_casts would say of it."""
    if text == "-":
        return None, None
    fill, *rest = text.split(":")
    if fill in _FILLS:
        dtype, shape = _DTYPES[rest[0]], tuple(int(n) for n in rest[1].split("x"))
        if fill == "arange":
            return torch.arange(torch.Size(shape).numel()).to(dtype).view(shape), None
        return getattr(torch, fill)(shape).to(dtype), None
    numbers = [_number(n) for n in fill.split(",")]
    casts = {"int": "int32", "short": "int16", "char": "int8", "uchar": "uint8", "half": "fp16", "bfloat": "bf16"}
    return (numbers if len(numbers) > 1 else numbers[0]), casts[rest[0]] if rest else None


def _shape(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else tuple(int(n) for n in text.split(","))


def _list(library: ShaderLibrary) -> None:
    for name in dir(library):
        kernel = library.kernel(name)
        print(name)
        for argument in kernel.arguments:
            if isinstance(argument, Buffer):
                kind = "threadgroup" if argument.space == "threadgroup" else "buffer"
                only = f" if {argument.condition}" if argument.condition else ""
                print(f"    {argument.type} {argument.name} [[{kind}({argument.index})]]{only}")


def _run(library: ShaderLibrary, options: argparse.Namespace) -> None:
    values = [_argument(a) for a in options.arg]
    lengths = {int(n): int(size) for n, size in (item.split("=") for item in options.threadgroup)}
    kernel = getattr(library, options.run)
    tensors = {i: v for i, (v, _) in enumerate(values) if isinstance(v, torch.Tensor)}
    before = {i: t.clone() for i, t in tensors.items()}
    with observe(
        instrumented=not options.fast,
        seed=options.seed,
        lockstep=options.lockstep,
        layout=options.layout,
        allow_partial_collectives=options.partial,
    ) as launches:
        kernel(
            *(v for v, _ in values),
            threads=_shape(options.threads),
            group_size=_shape(options.group),
            arg_casts={i: cast for i, (_, cast) in enumerate(values) if cast},
            threadgroup_bytes=lengths,
        )
    for i, tensor in tensors.items():
        if not torch.equal(tensor, before[i]):
            print(f"buffer {i}, written:\n{tensor}")
    print("counted:")
    for name, count in launches[0].counters.items():
        if count:
            print(f"    {name:28}{count:>12}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    constants = {}
    for item in options.constant:
        name, _, value = item.partition("=")
        constants[int(name) if name.isdigit() else name] = _number(value)
    include = [options.file.parent, *options.include]
    try:
        library = compile_shader(
            options.file.read_text(encoding="utf-8"), constants=constants, version=options.version, include=include
        )
        if options.run:
            _run(library, options)
        else:
            _list(library)
        if options.resources:
            for name in [options.run] if options.run else dir(library):
                print(f"{name}: {library.resources(name, threads=_threads(options))}")
    except (SyntaxError, KernelFault) as error:
        print(error, file=sys.stderr)
        return 1
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _threads(options: argparse.Namespace) -> int:
    group = _shape(options.group) or (256,)
    return max(32, torch.Size(group).numel())


if __name__ == "__main__":
    sys.exit(main())
