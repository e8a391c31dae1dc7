"""What reports say of the machine, and devices that are not there."""

import pytest
import torch

from flash_attn_mps.tiers.metal import gpu
from flash_attn_mps.tools import machine
from flash_attn_shim.commands import main


@pytest.fixture
def brand(monkeypatch):
    def set_to(text):
        monkeypatch.setattr(gpu, "_brand", lambda: text)
        gpu.name.cache_clear()
        gpu.generation.cache_clear()

    yield set_to
    gpu.name.cache_clear()
    gpu.generation.cache_clear()


@pytest.mark.parametrize(
    ("text", "generation", "name"),
    [
        ("Apple M1", 1, "Apple M1"),
        ("Apple M12 Ultra", 12, "Apple M12 Ultra"),
        ("Intel(R) Core(TM) i9", 0, ""),
        ("", 0, ""),
    ],
)
def test_generations(brand, text, generation, name):
    brand(text)
    assert gpu.generation() == generation
    assert gpu.name() == name


def test_core_counts_tell_gpus_of_one_name_apart(brand, monkeypatch):
    brand("Apple M3 Max")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 30, raising=False)
    assert gpu.name() == "Apple M3 Max, 30 cores"
    assert machine.facts("mps")["device"] == "mps: Apple M3 Max, 30 cores"


def test_facts_name_versions():
    facts = machine.facts("cpu")
    assert facts["torch"] == torch.__version__
    assert facts["device"].startswith("cpu: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("command", ["bench", "selftest"])
@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there(command, device, capsys):
    assert main([command, "--device", device]) == 2
    assert f"--device {device}: " in capsys.readouterr().err
