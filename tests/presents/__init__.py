"""Tests of the tree that an importer of `flash_attn` sees; importing this package makes that tree importable."""

import importlib.util
import sys
from pathlib import Path

PRESENTS = Path(__file__).parents[2] / "flash_attn_shim" / "presents"

if importlib.util.find_spec("flash_attn") is None:
    sys.path.insert(0, str(PRESENTS))
