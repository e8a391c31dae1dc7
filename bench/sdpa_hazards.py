"""Which of the calls that PyTorch is known to get wrong on MPS it gets wrong here, and what this package gives.

    python bench/sdpa_hazards.py [--device mps]

One call for each row of flash_attn_mps/sdpa/hazards.py but that of 2^31 scores, which takes minutes and much memory,
computed by PyTorch's own attention and by this package's, both compared with float64 on the CPU. "allowed" is twice the
error of rounding alone, plus 1e-3. Expected: torch within it where the row does not hold here, ours always. Please
report anything else.
"""

import argparse
import math

import torch
import torch.nn.functional as F

from flash_attn_mps import dispatch, sdpa
from flash_attn_mps.sdpa import attention, hazards, torch_paths
from flash_attn_mps.sdpa.call import Arguments, call_of

HALF, FP32 = torch.float16, torch.float32


def qkv(q, k=None, v=None, dtype=HALF, size=1.0):
    k = q if k is None else k
    return [(size * torch.randn(shape)).to(dtype) for shape in (q, k, k if v is None else v)]


def transposed(batch, seqlen, heads, head_dim):
    return [torch.randn(batch, seqlen, heads, head_dim).transpose(1, 2) for _ in range(3)]


def blind(queries, keys):
    mask = torch.rand(queries, keys) > 0.3
    mask[1] = False
    return mask


def of_batch(batch, queries, keys):
    return torch.rand(batch, 1, queries, keys) > 0.5


# issue: (q, k, v), further arguments
CALLS = {
    "pytorch#195910": (qkv((1, 4, 64, 64)), {"is_causal": True}),
    "pytorch#176767": (qkv((1, 2, 40, 32), None, (1, 2, 40, 16), FP32), {}),
    "pytorch#190791": (qkv((1, 1, 16, 40), (1, 1, 14000, 40)), {}),
    "pytorch#160841": (qkv((1, 1, 40, 64), size=40.0), {}),
    "pytorch#156707": (qkv((1, 1, 40, 64), dtype=FP32), {"attn_mask": blind(40, 40)}),
    "pytorch#174861": (qkv((1, 8, 1, 128), (1, 8, 1500, 128)), {}),
    "pytorch#169222": (qkv((1, 8, 1, 64), (1, 8, 39, 64), dtype=FP32), {}),
    "pytorch#181133": (transposed(84, 3, 3, 64), {}),
    "pytorch#182285": (qkv((1, 1, 8, 64), (1, 1, 512, 64), dtype=FP32), {"attn_mask": torch.rand(8, 512) > 0.5}),
    "pytorch#184180": (qkv((2, 4, 8, 64), dtype=FP32), {"attn_mask": of_batch(2, 8, 8)}),
}


def plain(dtype, tensors, attn_mask=None, is_causal=False):
    q, k, v = (tensor.to(dtype) for tensor in tensors)
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    seen = torch.ones(s.shape[-2:], dtype=torch.bool).tril() if is_causal else attn_mask
    if seen is not None:
        s = s.masked_fill(~seen, -math.inf)
    p = torch.softmax(s, -1)
    return (p.masked_fill(~seen.any(-1, keepdim=True), 0.0) if seen is not None else p) @ v


def error(out, exact):
    """The largest; inf for a wrong shape or what is not finite."""
    out = out.detach().cpu().double()
    return (out - exact).abs().max().item() if out.shape == exact.shape and out.isfinite().all() else math.inf


def ours(arguments):
    return attention.as_called(dispatch.attention(attention.problem(arguments)).out, arguments.query)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="mps")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    rows = {hazard.issue: hazard for hazard in hazards.TABLE}
    release = torch_paths.version(torch.__version__)
    print(f"torch {torch.__version__} on {chosen.device}")
    print(f"{'issue':16} {'holds here':10} {'torch':>9} {'ours':>9} {'allowed':>9}")
    with torch.no_grad():
        for issue, (tensors, how) in CALLS.items():
            exact = plain(torch.float64, tensors, **how)
            allowed = 2 * error(plain(FP32, tensors, **how).to(tensors[0].dtype), exact) + 1e-3
            mask = how.get("attn_mask")
            moved = [tensor.to(chosen.device) for tensor in tensors]
            mask = None if mask is None else mask.to(chosen.device)
            arguments = Arguments(*moved, mask, is_causal=how.get("is_causal", False))
            theirs = F.scaled_dot_product_attention(*moved, mask, is_causal=arguments.is_causal)
            expected = hazards.hazards(call_of(arguments), release)
            holds = "yes" if rows[issue] in expected else "no"
            found = [f"{error(out, exact):9.2g}" for out in (theirs, ours(arguments))]
            print(f"{issue:16} {holds:10} {found[0]} {found[1]} {allowed:9.2g}  {rows[issue].what}")
    if sdpa.is_installed():
        print("MTLFLASHATTN_SDPA is on: torch's column is this package's")


if __name__ == "__main__":
    main()
