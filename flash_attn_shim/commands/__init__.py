"""The `mtlflashattn` command: each subcommand is a module here with `add_arguments(parser)` and `run(arguments)`."""

import argparse
from importlib import import_module

_COMMANDS = {
    "doctor": "say what `import flash_attn` gives here, and why",
    "demo": "embed and search sentences with a real model, through flash_attention_2",
    "bench": "time this project, stock PyTorch and other packages side by side",
    "selftest": "compare every tier, and on a Mac every Metal kernel, with attention in float64",
    "tune": "time the Metal kernel's variants on this GPU and keep the fastest",
    "run": "run a script with the shim installed, where .pth files do not run",
}


def main(argv=None):
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
    return arguments.run(arguments)
