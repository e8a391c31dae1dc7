"""What `mtlflashattn doctor` says of PyTorch's own attention."""

import sys
import types

import torch.nn.functional as F

from flash_attn_mps import sdpa
from flash_attn_shim.commands import doctor, examine


def test_hazards_of_this_torch_and_the_switch():
    found = examine._sdpa()
    assert "MTLFLASHATTN_SDPA=on" in found["scaled_dot_product_attention"]
    (wrong,) = (value for name, value in found.items() if name.endswith("on MPS is wrong"))
    assert any("pytorch#179352" in line for line in wrong)
    with sdpa.installed():
        assert examine._sdpa()["scaled_dot_product_attention"] == "replaced"


def test_modules_that_took_torchs_function_are_named_with_advice(monkeypatch):
    module = types.ModuleType("some_model")
    module.sdpa = F.scaled_dot_product_attention
    monkeypatch.setitem(sys.modules, "some_model", module)
    with sdpa.installed():
        findings = examine.everything()
    assert "some_model.sdpa" in findings["sdpa"]["modules that took torch's function"]
    (advice,) = (line for line in findings["advice"] if "some_model.sdpa" in line)
    assert "mps_fa" in advice
    assert "PyTorch's own attention" in doctor.render(findings)
