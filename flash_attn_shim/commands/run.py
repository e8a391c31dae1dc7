"""`mtlflashattn run script.py ...`: the script as `__main__`, with the import hook set first."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys

import flash_attn_shim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sdpa",
        action="store_true",
        help="also take over PyTorch's own attention, in this process and its children (sets MTLFLASHATTN_SDPA=on)",
    )
    parser.add_argument("script", help="path of a Python file")
    parser.add_argument("arguments", nargs="...", help="arguments of the script")


def run(arguments: argparse.Namespace) -> int:
    flash_attn_shim.install()
    if arguments.sdpa:
        os.environ["MTLFLASHATTN_SDPA"] = "on"
    if "MTLFLASHATTN_SDPA" in os.environ:  # the script may never import a package that reads it
        importlib.import_module("flash_attn_mps")
    sys.argv = [arguments.script, *arguments.arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(arguments.script))  # as `python script.py` has it
    runpy.run_path(arguments.script, run_name="__main__")
    return 0
