"""Predicted speed of attention kernels on Apple's GPUs.

    python -m apple_model defaults                              what a call gets, with features too, untuned
    python -m apple_model variants --chip "M1 Max" --dim 128    every variant of the kernel, the fastest first
    python -m apple_model training                              forward and backward
    python -m apple_model validate                              published times beside the model's
    python -m apple_model write                                 the tables of docs/apple-model.md, anew

Needs what metal_host's PTX needs: ziglang, and of a CUDA toolkit libdevice and ptxas. No GPU.
"""

from __future__ import annotations

import argparse

from . import tables
from .chips import CHIPS
from .kernels import ELEMENTS
from .predict import Call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("defaults", "variants", "training", "validate", "write"))
    parser.add_argument("--chip", choices=CHIPS, action="append", help="may be given again; default: those judged")
    parser.add_argument("--dim", type=int, action="append", help="head dim; may be given again")
    parser.add_argument("--dtype", choices=ELEMENTS, action="append")
    parser.add_argument("--length", type=int, default=tables.CALL.queries, help="queries and keys")
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args()
    chips, elements = options.chip or tables.JUDGED, options.dtype or ["fp16"]
    dims = options.dim or tables.HEAD_DIMS
    if options.what == "defaults":
        print(tables.defaults(chips, elements, dims), tables.of_features(elements, dims), sep="\n\n")
    elif options.what == "variants":
        call = Call(tables.CALL.batch, tables.CALL.heads, options.length, options.length, options.causal)
        for chip in chips:
            for element in elements:
                for dim in dims:
                    print(tables.all_variants(CHIPS[chip], element, dim, call), end="\n\n")
    elif options.what == "training":
        print(tables.training())
    elif options.what == "validate":
        print(tables.validation(), tables.summary(), sep="\n\n")
    else:
        tables.write_page()


if __name__ == "__main__":
    main()
