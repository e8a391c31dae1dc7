"""The `mtlflashattn` command: each subcommand is a module here with `add_arguments(parser)` and `run(arguments)`."""

from __future__ import annotations

import argparse
import os
import select
import sys
from importlib import import_module

from flash_attn_shim import owners

_COMMANDS = {
    "doctor": "show what `import flash_attn` gives here, and why",
    "demo": "search sentences with a real model through flash_attention_2, or fine-tune it",
    "bench": "time this project, stock PyTorch and other packages side by side",
    "selftest": "compare every tier, and on a Mac every Metal kernel, with attention in float64",
    "report": "all that can be known of this machine in five minutes, as a page to attach to an issue",
    "tune": "time the variants of the Metal kernel on this GPU and save the fastest",
    "run": "run a script with the import hook set, where Python's start-up files do not run",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command of these arguments (None: of the process); return its exit status."""
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # here, where it can be handled, and not when the interpreter ends
    except BrokenPipeError:
        cut = [stream for stream in (sys.stdout, sys.stderr) if _is_cut(stream)]
        if not cut:  # somebody else's pipe or socket, in a script of `mtlflashattn run`
            raise
        # As Python's documentation has it ("Note on SIGPIPE"): nothing is flushed to it again, and the status is 1.
        for stream in cut:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 1


def _run(argv):
    parser = argparse.ArgumentParser(
        prog="mtlflashattn", description="Programs written for CUDA flash-attention, unchanged on Apple-silicon Macs."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, purpose in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        command = import_module(f"flash_attn_shim.commands.{name}")
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    foreign = None if arguments.command == "doctor" else owners.foreign_package()
    if foreign:
        print(f"mtlflashattn cannot run here: {foreign}.", file=sys.stderr)
        return 2
    return arguments.run(arguments)


def _is_cut(stream):
    """Has the reader of the stream, as of `mtlflashattn doctor | head`, gone away?"""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))
