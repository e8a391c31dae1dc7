"""The tiled kernels of both passes on an NVIDIA GPU, against the CPU.

    compute-sanitizer --tool TOOL python -m tests.metal.sanitized

TOOL: memcheck (with PYTORCH_NO_CUDA_MEMORY_CACHING=1: torch's allocator hides where buffers end), racecheck, initcheck.
MTLFLASHATTN_VARIANT chooses the variant, such as 16x4x32-staged; MTLFLASHATTN_VARIANT_DQ and _DKV those of gradients.
The arithmetic of the reference stays on the CPU, so that nothing but the kernels is looked at.
"""

import itertools

import torch

import flash_attn_mps as fa
from flash_attn_mps.tiers.metal import compiler
from metal_host import compile_shader

LENGTHS_Q, LENGTHS_K = [130, 0, 257], [200, 33, 257]
CASES = [{}, {"causal": True}, {"window_size": (70, 10)}]


def main() -> None:
    compiler.compile_shader, compiler.device_types = compile_shader, frozenset({"cuda"})
    torch.manual_seed(0)
    ends = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (LENGTHS_Q, LENGTHS_K)]
    for head_dim, options in itertools.product((64, 96, 128), CASES):
        heads = ((sum(LENGTHS_Q), 2), (sum(LENGTHS_K), 1), (sum(LENGTHS_K), 1))
        leaves = [torch.randn(*shape, head_dim).half() for shape in heads]
        dout = torch.randn(heads[0] + (head_dim,)).half()
        results = []
        for device in ("cuda", "cpu"):
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
