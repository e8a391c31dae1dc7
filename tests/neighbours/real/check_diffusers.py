"""diffusers: the backends "flash" and "flash_varlen" run on tiny transformers and equal "native", forward and backward.

The backends are chosen with `set_attention_backend`, as users do.
"""

MODELS = """
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

def flux():
    model = FluxTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8])
    return model, lambda: dict(hidden_states=torch.randn(2, 16, 4), encoder_hidden_states=torch.randn(2, 8, 32),
        pooled_projections=torch.randn(2, 32), timestep=torch.ones(2), img_ids=torch.randn(16, 3),
        txt_ids=torch.randn(8, 3))

def wan():
    model = WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2)
    return model, lambda: dict(hidden_states=torch.randn(1, 4, 2, 8, 8), timestep=torch.tensor([1]),
        encoder_hidden_states=torch.randn(1, 7, 16))

def results(model, inputs, backend, **arguments):
    model.set_attention_backend(backend)
    model.zero_grad()
    torch.manual_seed(1)
    sample = model(**inputs(), **arguments).sample
    sample.square().sum().backward()
    return [sample.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
"""


def test_flash_and_flash_varlen_equal_native(hooked):
    program = f"""
{MODELS}
from flash_attn_mps import trace
for make in (flux, wan):
    torch.manual_seed(0)
    model, inputs = make()
    native = results(model, inputs, "native")
    for backend in ("flash", "flash_varlen"):
        trace.enable()
        trace.calls.clear()
        for got, expected in zip(results(model, inputs, backend), native, strict=True):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
        print(make.__name__, backend, sum(trace.calls.values()) > 0)
"""
    printed = hooked.run(program, MTLFLASHATTN_SHIM="on", DIFFUSERS_VERBOSITY="error")
    assert printed.splitlines() == [
        f"{model} {backend} True" for model in ("flux", "wan") for backend in ("flash", "flash_varlen")
    ]


def test_probes_and_what_stays_unavailable(hooked):
    program = f"""
{MODELS}
from diffusers.models import attention_dispatch
from diffusers.utils import is_flash_attn_available, is_flash_attn_version
from diffusers.utils.import_utils import is_flash_attn_3_available
assert is_flash_attn_available() and is_flash_attn_version(">=", "2.6.3") and not is_flash_attn_3_available()
from flash_attn import flash_attn_interface
for name in ("flash_attn_varlen_func", "_wrapped_flash_attn_forward", "_wrapped_flash_attn_backward"):
    assert getattr(attention_dispatch, name) is getattr(flash_attn_interface, name)
model, _ = flux()
for backend in ("_flash_3", "_flash_varlen_3", "_flash_3_hub", "flash_hub", "flash_varlen_hub"):
    try:
        model.set_attention_backend(backend)
    except RuntimeError as error:
        print(backend, "package" in str(error))
"""
    printed = hooked.run(program, MTLFLASHATTN_SHIM="on", DIFFUSERS_VERBOSITY="error").splitlines()
    assert printed[:2] == ["_flash_3 True", "_flash_varlen_3 True"]
    assert len(printed) == 5


def test_a_mask_is_refused_by_diffusers(hooked):
    """The backend "flash" takes no mask, and diffusers says so itself."""
    program = """
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
q = torch.randn(1, 5, 2, 16)
mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
dispatch_attention_fn(q, q, q, attn_mask=mask, backend="native")
try:
    dispatch_attention_fn(q, q, q, attn_mask=mask, backend="flash")
except ValueError as error:
    print(error)
"""
    printed = hooked.run(program, MTLFLASHATTN_SHIM="on", DIFFUSERS_VERBOSITY="error")
    assert "attn_mask" in printed and "not supported" in printed


def test_a_late_install(hooked):
    program = f"""
import os, warnings
{MODELS}
from diffusers.utils import is_flash_attn_available
assert not is_flash_attn_available()
warnings.simplefilter("error")
os.environ["MTLFLASHATTN_SHIM"] = "on"
import flash_attn_shim
flash_attn_shim.install()
torch.manual_seed(0)
model, inputs = flux()
native = results(model, inputs, "native")
warnings.simplefilter("ignore")
for got, expected in zip(results(model, inputs, "flash"), native, strict=True):
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
flash_attn_shim.uninstall()
assert not is_flash_attn_available()
"""
    assert hooked.run(program, MTLFLASHATTN_SHIM="off", DIFFUSERS_VERBOSITY="error") == ""
