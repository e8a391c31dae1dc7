"""What a report says about the machine it was made on."""

from __future__ import annotations

import platform
import sys

import torch

from .. import __version__
from ..tiers.metal import gpu


def facts(device: torch.device | str) -> dict[str, str]:
    """Versions, system and the device's name."""
    system = f"macOS {gpu.macos() or platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    return {
        "mtlflashattn": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{system} {platform.machine()}",
        "device": f"{torch.device(device).type}: {_name(torch.device(device))}",
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return gpu.name() or "unknown GPU"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def unusable(device: str) -> str | None:
    """Why torch cannot compute on `device` here, in words; None if it can."""
    try:
        torch.ones(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"--device {device}: {str(error).strip().splitlines()[0]}"
    return None


def best_device() -> str:
    """The first available of mps, cuda and cpu."""
    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"
