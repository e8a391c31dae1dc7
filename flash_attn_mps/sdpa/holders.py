"""Who took torch's function before `install`: `from torch.nn.functional import scaled_dot_product_attention`."""

from __future__ import annotations

import sys

from . import patch


def holders() -> list[str]:
    """Names like "some.module.sdpa" of all module attributes that are still torch's function: `install` cannot reach
    these. Import such a module after `install`, or set the attribute yourself."""
    original = patch.torchs()
    found = []
    for module_name, module in sorted(sys.modules.items()):
        if module is None or module_name.split(".")[0] in ("torch", "flash_attn_mps"):
            continue
        attributes = getattr(module, "__dict__", None)
        if isinstance(attributes, dict):
            found += [f"{module_name}.{name}" for name, value in list(attributes.items()) if value is original]
    return found
