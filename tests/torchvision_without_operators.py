"""Makes `import torchvision` work beside a torch that its compiled operators were not built for.

The wheels of torchvision that pip finds are for torch with CUDA. Beside a torch for the CPU alone their operators do
not load, which torchvision allows; but it then describes operators that nobody declared, and its import ends with
"operator torchvision::nms does not exist". With the names declared it is imported, and what needs no operator of it
runs: its transforms, timm's models, the image processors of transformers. Calling an operator still raises
torchvision's own error. To be called before `import transformers`, which imports torchvision if it is there.
"""

import importlib.util
import re
from pathlib import Path

import torch

_DESCRIBED = re.compile(r'register_fake\("torchvision::(\w+)"\)|@register_meta\("(\w+)"')
_libraries = []  # a library that is freed takes its operators along


def importable():
    """Is torchvision there, and can it be imported? Declares the names of its operators if that is what it takes."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return False
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _declare(Path(spec.submodule_search_locations[0], "_meta_registrations.py").read_text(encoding="utf-8"))
        import torchvision  # noqa: F401
    return True


def _declare(descriptions):
    """Declare every operator that the text of torchvision's descriptions names; nothing calls one by its schema."""
    library = torch.library.Library("torchvision", "DEF")
    for match in _DESCRIBED.finditer(descriptions):
        library.define(f"{match[1] or match[2]}(Tensor input) -> Tensor")
    _libraries.append(library)
