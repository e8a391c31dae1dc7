"""Make `flash_attn` importable for the tests in this folder, on any machine."""

import importlib.util
import sys
from pathlib import Path

import torch

PRESENTS = Path(__file__).parents[2] / "flash_attn_shim" / "presents"

if importlib.util.find_spec("flash_attn") is None:
    sys.path.insert(0, str(PRESENTS))

# Many small operations: more threads only wait for each other.
torch.set_num_threads(2)
