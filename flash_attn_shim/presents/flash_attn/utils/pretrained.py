"""`flash_attn.utils.pretrained`."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def state_dict_from_pretrained(
    model_name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The `state_dict` of a model of the Hugging Face hub, or of a folder as transformers saves it.

    Args:
        model_name: a folder, or a name on the hub. `pytorch_model.bin` comes before `model.safetensors`, and either
            may be in shards.
        device, dtype: what to move and cast the tensors to.

    Raises:
        ImportError: transformers, or for such files safetensors, is not installed.
        OSError: there are no weights.
    """
    from transformers.utils import hub

    files = _weight_files(model_name, hub)
    state_dict = {}
    for file in files:
        state_dict.update(_load(file))
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in state_dict.items()}


def _weight_files(model_name, hub) -> list[str]:
    for name in ("pytorch_model.bin", "model.safetensors"):
        for is_index, candidate in enumerate((name, f"{name}.index.json")):
            if os.path.isdir(model_name) and not os.path.isfile(os.path.join(model_name, candidate)):
                continue
            file = hub.cached_file(model_name, candidate, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                return hub.get_checkpoint_shard_files(model_name, file)[0] if is_index else [file]
    raise OSError(f"model_name: no weights found for {model_name!r}")


def _load(file) -> dict:
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)
