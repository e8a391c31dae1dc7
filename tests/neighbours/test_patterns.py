"""How programs take flash_attn that are too heavy for the tests: their manner, in words of our own."""

import textwrap

EXPECTED = """
import torch
torch.manual_seed(0)

def expected(q, k, v, causal=False):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()).to(q.dtype)
"""

PATTERNS = {
    # ComfyUI, comfy/ldm/modules/attention.py: our function inside an operator of its own, called on transposed views.
    # Other builds of flash_attn fail here in torch's dispatcher, and ComfyUI then falls back in silence.
    "ComfyUI": """
        try:
            from flash_attn import flash_attn_func
        except ModuleNotFoundError:
            raise SystemExit("--use-flash-attention needs flash-attn")

        @torch.library.custom_op("comfy::flash_attn", mutates_args=())
        def wrapper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, causal: bool = False,
                    softmax_scale: float = -1.0) -> torch.Tensor:
            scale = None if softmax_scale == -1.0 else softmax_scale
            return flash_attn_func(q, k, v, dropout_p=dropout_p, causal=causal, softmax_scale=scale)

        @wrapper.register_fake
        def fake(q, k, v, dropout_p=0.0, causal=False, softmax_scale=-1.0):
            return torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=q.device)

        def attention(q, k, v):  # (batch, heads, seqlen, head_dim)
            return wrapper(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, False).transpose(1, 2)

        q, k, v = torch.randn(3, 2, 4, 9, 16).unbind()
        wanted = expected(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        for call in (attention, torch.compile(attention, backend="aot_eager", fullgraph=True)):
            assert torch.allclose(call(q, k, v), wanted, atol=1e-5)
        """,
    # SeedVR2, src/optimization/compatibility.py: a name or None, and a flag; varlen, called in half precision.
    "SeedVR2": """
        try:
            from flash_attn import flash_attn_varlen_func
            FLASH_ATTN_AVAILABLE = True
        except ImportError:
            flash_attn_varlen_func, FLASH_ATTN_AVAILABLE = None, False
        assert FLASH_ATTN_AVAILABLE
        q, k, v = torch.randn(3, 9, 4, 16).bfloat16().unbind()
        cu = torch.tensor([0, 4, 9], dtype=torch.int32)
        out = flash_attn_varlen_func(q=q, k=k, v=v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5)
        for part in (slice(0, 4), slice(4, 9)):
            wanted = expected(*(x[None, part].float() for x in (q, k, v)))[0]
            assert torch.allclose(out[part].float(), wanted, atol=2e-2)
        """,
    # xformers, ops/fmha/flash.py: looks, takes the extension's object without a guard, and a window of versions.
    "xformers": """
        import importlib.util
        assert importlib.util.find_spec("flash_attn")
        import flash_attn, flash_attn.flash_attn_interface
        if hasattr(flash_attn.flash_attn_interface, "flash_attn_cuda"):
            gpu = flash_attn.flash_attn_interface.flash_attn_cuda
        else:
            gpu = flash_attn.flash_attn_interface.flash_attn_gpu
        from packaging.version import parse
        assert parse("2.7.1") <= parse(flash_attn.__version__) <= parse("2.8.4")
        assert importlib.util.find_spec("flash_attn_3") is None
        """,
    # DiffSynth: FlashAttention 3 first, whichever way it returns.
    "DiffSynth": """
        try:
            import flash_attn_interface
            version = 3
        except ModuleNotFoundError:
            version = 2
        q, k, v = torch.randn(3, 1, 5, 2, 16).unbind()
        out = flash_attn_interface.flash_attn_func(q, k, v)
        if isinstance(out, tuple):
            out = out[0]
        assert version == 3 and torch.allclose(out, expected(q, k, v), atol=1e-5)
        """,
}


def test_patterns(hooked):
    """In one interpreter: none of them leaves anything behind for the next."""
    patterns = {name: textwrap.dedent(code) for name, code in PATTERNS.items()}
    program = f"""{EXPECTED}
for name, code in {patterns!r}.items():
    exec(compile(code, name, "exec"), dict(globals()))
    print(name)
"""
    assert hooked.run(program, MTLFLASHATTN_SHIM="on").splitlines() == list(PATTERNS)
