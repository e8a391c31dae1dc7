"""Which of the calls that PyTorch is known to get wrong on MPS it gets wrong here, and what this package gives.

    python bench/sdpa_hazards.py [--device mps]

Both are compared with float64 on the CPU (flash_attn_mps/tools/report/hazards.py; `mtlflashattn report` has it too).
"allowed" is twice the error of rounding alone, plus 1e-3. Expected: torch within it where the row does not hold here,
ours always. Please report anything else.
"""

import argparse

import torch

from flash_attn_mps import sdpa
from flash_attn_mps.tools.report import hazards


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="mps")
    device = parser.parse_args().device
    print(f"torch {torch.__version__} on {device}")
    print(f"{'issue':16} {'holds here':10} {'torch':>9} {'ours':>9} {'allowed':>9}")
    for row in hazards.run(device):
        holds = "yes" if row.holds else "no"
        print(f"{row.issue:16} {holds:10} {row.torch:9.2g} {row.ours:9.2g} {row.allowed:9.2g}  {row.what}")
    if sdpa.is_installed():
        print("MTLFLASHATTN_SDPA is on: torch's column is this package's")


if __name__ == "__main__":
    main()
