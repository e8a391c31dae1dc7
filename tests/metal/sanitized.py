"""The tiled kernels of both passes, and what is done to caches, on an NVIDIA GPU, against the CPU.

    compute-sanitizer --tool TOOL python -m tests.metal.sanitized

TOOL: memcheck (with PYTORCH_NO_CUDA_MEMORY_CACHING=1: torch's allocator hides where buffers end), racecheck, initcheck.
MTLFLASHATTN_VARIANT chooses the variant, such as 16x4x32-staged; MTLFLASHATTN_VARIANT_DQ and _DKV those of gradients.
The arithmetic of the reference stays on the CPU, so that nothing but the kernels is looked at.
"""

import itertools

import torch

import flash_attn_mps as fa
from flash_attn_mps.frontends import fa3
from flash_attn_mps.tiers.metal import compiler
from metal_host import compile_shader

DEVICE = "cuda"
LENGTHS_Q, LENGTHS_K = [130, 0, 257], [200, 33, 257]
CASES = [{}, {"causal": True}, {"window_size": (70, 10)}]
CODES = (None, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def append(codes: torch.dtype | None, in_pages: bool) -> None:
    """Rotate and append rows to caches, plain or in pages, of float16 or of codes, and attend."""
    q, k, v = (torch.randn(3, 5, heads, 96).half() for heads in (4, 2, 2))
    shape = (15, 16) if in_pages else (3, 80)
    caches = [torch.randn(*shape, 2, 96).mul(2).round().clamp(-4, 4).to(codes or torch.float16) for _ in "kv"]
    tables = [torch.randn(100, 40).half() for _ in "cs"]
    how = {"cache_seqlens": torch.tensor([0, 33, 70], dtype=torch.int32), "causal": True}
    if in_pages:
        how["page_table"] = torch.randperm(15).view(3, 5).to(torch.int32)
    if codes is not None:
        how |= {name: torch.rand(3, 2) + 0.5 for name in ("k_descale", "v_descale")}

    def call(device: str) -> list[torch.Tensor]:
        own = [t.to(device) for t in (q, *caches, k, v)]
        options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in how.items()}
        out = fa3.flash_attn_with_kvcache(
            *own, rotary_cos=tables[0].to(device), rotary_sin=tables[1].to(device), **options
        )
        return [x.cpu() for x in (out, *own[1:3])]

    (out, *ours), (expected, *theirs) = call(DEVICE), call("cpu")
    error = (out.float() - expected.float()).abs().max().item()
    differ = max((a.float() - b.float()).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    print(f"append, codes {codes}, pages {in_pages}: {error:.1e} in the output, {differ:.1e} in the caches", flush=True)
    assert error < 2e-2  # of caches that may differ by a unit in the last place, where a rotation was rounded otherwise
    assert differ < 1e-2 or codes is not None


def main() -> None:
    compiler.compile_shader, compiler.device_types = compile_shader, frozenset({DEVICE})
    torch.manual_seed(0)
    for codes, in_pages in itertools.product(CODES, (False, True)):
        append(codes, in_pages)
    ends = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (LENGTHS_Q, LENGTHS_K)]
    for head_dim, options in itertools.product((64, 96, 128), CASES):
        heads = ((sum(LENGTHS_Q), 2), (sum(LENGTHS_K), 1), (sum(LENGTHS_K), 1))
        leaves = [torch.randn(*shape, head_dim).half() for shape in heads]
        dout = torch.randn(heads[0] + (head_dim,)).half()
        results = []
        for device in (DEVICE, "cpu"):
            tensors = [t.to(device).requires_grad_() for t in leaves]
            out = fa.flash_attn_varlen_func(*tensors, *(t.to(device) for t in ends), 257, 257, **options)
            results.append([out.detach(), *torch.autograd.grad(out, tensors, dout.to(device))])
        errors = [(a.cpu().float() - b.float()).abs().max().item() for a, b in zip(*results, strict=True)]
        of = ", ".join(f"{name} {error:.1e}" for name, error in zip(("out", "dq", "dk", "dv"), errors, strict=True))
        print(f"head_dim {head_dim} {options}: largest differences {of}", flush=True)
        assert errors[0] < 4e-3
        assert max(errors) < 4e-2


if __name__ == "__main__":
    main()
