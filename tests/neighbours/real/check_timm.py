"""timm: models compute to the bit what they compute without the shim, and their fused attention can be served."""

import importlib.util
from pathlib import Path

TORCHVISION = Path(__file__).resolve().parents[2] / "torchvision_without_operators.py"

MODELS = f"""
import os, runpy
declarations = runpy.run_path({str(TORCHVISION)!r})  # kept: they go when it does
assert declarations["importable"]()
import hashlib, sys
import timm, torch
from timm.layers import set_fused_attn, use_fused_attn

SMALL = dict(img_size=32, num_classes=5, embed_dim=32)
SIZES = dict(
    vit_tiny_patch16_224=dict(patch_size=8, depth=2, num_heads=2, **SMALL),
    # Its mask is a bias that is trained, plus the mask of shifted windows.
    swin_tiny_patch4_window7_224=dict(window_size=4, depths=(2, 2), num_heads=(2, 2), drop_path_rate=0.0, **SMALL),
)
image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

def make(name, fused):
    set_fused_attn(fused, experimental=True)  # Swin asks for the latter
    assert use_fused_attn() is fused
    torch.manual_seed(0)
    model = timm.create_model(name, **SIZES[name])
    for parameter in model.parameters():  # so large that scores matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model

def trained(model):
    logits = model(image)
    logits.square().mean().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]
"""


def test_what_it_computes_is_the_same_to_the_bit(hooked, without):
    program = """
print(timm.__version__, use_fused_attn())
for name in SIZES:
    for fused in (True, False):
        numbers = b"".join(tensor.numpy().tobytes() for tensor in trained(make(name, fused)))
        print(name, fused, len(numbers), hashlib.sha256(numbers).hexdigest())
print(sorted(name for name in sys.modules if name.startswith("flash_attn") and not name.startswith("flash_attn_")))
"""
    expected = without.run(MODELS + program)
    assert expected.splitlines()[-1] == "[]"
    for mode in ("on", "off", "auto"):
        assert hooked.run(MODELS + program, MTLFLASHATTN_SHIM=mode) == expected, mode
    patched = "from flash_attn_mps import sdpa\nsdpa.install()\n"  # tensors on the CPU stay torch's
    assert hooked.run(MODELS + patched + program, MTLFLASHATTN_SHIM="on") == expected


def test_its_fused_attention_is_served(hooked):
    """Every call is taken, as if the CPU were MPS, but those whose mask is trained; timm's own products are right."""
    program = f"""
{MODELS}
from flash_attn_mps import sdpa
from flash_attn_mps.sdpa import obstacles
obstacles.DEVICE = "cpu"
sdpa.install()
for name in SIZES:
    expected, got = (trained(make(name, fused)) for fused in (False, True))
    with torch.no_grad():
        expected.append(make(name, False)(image))
        got.append(make(name, True)(image))
    for one, other in zip(expected, got, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * expected[0].abs().max())
    stats = sdpa.stats()
    print(name, sum(stats["taken"].values()), stats["left"], stats["fell through"])
    sdpa.reset()
"""
    limits = dict.fromkeys((f"MTLFLASHATTN_SDPA_{limit}" for limit in ("MIN_GB", "MIN_SEQ", "FAST_MIN_SEQ")), "0")
    variables = {**limits, "MTLFLASHATTN_KERNEL": "torch"}
    printed = hooked.run(program, MTLFLASHATTN_SHIM="on", **variables)
    assert printed.splitlines() == [
        "vit_tiny_patch16_224 4 {} {}",
        "swin_tiny_patch4_window7_224 4 {'mask': 4} {}",
    ]


def test_it_asks_nobody():
    """Its source does not name flash_attn at all."""
    source = Path(importlib.util.find_spec("timm").origin).parent
    files = list(source.rglob("*.py"))
    assert len(files) > 100
    assert not [path for path in files if "flash_attn" in path.read_text(encoding="utf-8")]
