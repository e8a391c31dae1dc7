"""A process that examines model classes: reads a name a line, writes a report as JSON a line."""

import json
import os
import resource
import sys
import warnings


def main():
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print is none of the answers
    warnings.simplefilter("ignore")
    import torch
    import transformers

    import flash_attn_shim

    flash_attn_shim.install()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    from . import compare

    for line in sys.stdin:
        print(json.dumps(compare.examine(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
