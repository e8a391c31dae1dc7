"""Writes which attention kernels of other projects run right into docs/metal-sources.md.

    python -m tests.test_metal_host.public_table FOLDER

FOLDER holds the checkouts that `test_public_*.py` name. Every run is instrumented: a fault of a kernel fails its test.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from metal_host import survey

HERE = Path(__file__).parent
KERNELS = {
    "test_mlx_steel_attention[": "MLX `steel_attention`",
    "test_sdpa_vector[mlx": "MLX `sdpa_vector`",
    "test_sdpa_vector[candle": "candle `sdpa_vector`",
    "test_llama_cpp_flash_attn_ext[": "llama.cpp `kernel_flash_attn_ext`, in lockstep",
    "test_llama_cpp_flash_attn_ext_vec": "llama.cpp `kernel_flash_attn_ext_vec`, in lockstep",
    "test_flash_sdpa": "Hugging Face `metal-flash-sdpa`, packed sequences",
    "test_paged_attention": "Hugging Face `paged-attention`, one pass and two",
    "test_gpt_oss": "Hugging Face `gptoss_f32_sdpa_q8_d64`",
    "test_natten": "natten_mps, 1 to 3 dimensions, through its package",
    "test_prefill": "torch's prefill kernel",
    "test_mpp_attention[a10": "torch's `MppAttention.h`, a10: right under `apple10`, wrong under the other layouts",
    "test_mpp_attention[a9": "torch's `MppAttention.h`, a9: right under `legacy`, wrong under the other layouts",
    "test_mlx_steel_attention_nax": "MLX `steel_attention_nax` and `_dsplit`: right under `apple10`, wrong under the others",
    "test_mlx_steel_gemm_nax": "MLX `steel_gemm_fused_nax`: the same",
    "test_quantised_gemm_nax": "Hugging Face `affine_qmm_t_nax`: the same",
    "test_mtlflashattn_tensor_ops[v2-": "mtlflashattn `flash_attn_fwd_v2`: right under every layout",
    "test_mtlflashattn_tensor_ops[v2r-": "mtlflashattn `flash_attn_fwd_v2r`: right under the layouts that the device calls compatible, and told under the others",
    "test_decode": "torch's decode kernels",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        tests = [*HERE.glob("test_public_*.py"), HERE / "test_torch_kernels.py"]
        selection = ["-m", "metal_full or not metal_full", "-k", "not every", "-q", "-n", "0"]
        command = [sys.executable, "-m", "pytest", *map(str, tests), *selection]
        subprocess.run(
            [*command, f"--junitxml={results}"], check=False, env={**os.environ, "METAL_HOST_SOURCES": sys.argv[1]}
        )
        cases = list(ElementTree.parse(results).iter("testcase"))  # of a file that pytest has just written
    tried, wrong = Counter(), Counter()
    for case in cases:
        name = case.get("name", "")
        kernel = next((title for prefix, title in KERNELS.items() if name.startswith(prefix)), None)
        if kernel and case.find("skipped") is None:
            tried[kernel] += 1
            wrong[kernel] += case.find("failure") is not None or case.find("error") is not None
    lines = ["| kernel | right to float64 and without a fault |", "| --- | --- |"]
    lines += [
        f"| {title} | {tried[title] - wrong[title]} of {tried[title]} |" for title in KERNELS.values() if tried[title]
    ]
    survey.replace(HERE.parents[1] / "docs" / "metal-sources.md", "right", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
