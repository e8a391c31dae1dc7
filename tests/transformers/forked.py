"""Runs programs in forks of a process that has imported others' libraries: what takes most of transformers' own import.

None of them asks for flash_attn. transformers is imported by each program anew: what it concludes can be concluded
once a process. `python forked.py` reads a JSON object a line, "arguments" (as python has them: ["-c", source] or
[file, ...]) and "environment", and answers with one a line: "returncode", "stdout", "stderr".
"""

import gc
import importlib
import json
import os
import runpy
import sys
import tempfile

BEFORE = (
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "numpy.f2py",
    "scipy.optimize",
    "jinja2.sandbox",
    "huggingface_hub.lfs",
    "safetensors.torch",
    "tokenizers",
)
NOT_BEFORE = ("transformers", "flash_attn", "flash_attn_interface", "flash_attn_mps")


def serve():
    """Answers requests until there are no more. In the fork that is to run a program, returns its arguments instead."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                for file, descriptor in ((out, 1), (err, 2)):
                    os.dup2(file.fileno(), descriptor)
                os.environ.clear()
                os.environ.update(request["environment"])
                return request["arguments"]
            _, status = os.waitpid(child, 0)
            printed = []
            for file in (out, err):
                file.seek(0)
                printed.append(file.read().decode())
        answer = {"returncode": os.waitstatus_to_exitcode(status), "stdout": printed[0], "stderr": printed[1]}
        print(json.dumps(answer), file=answers, flush=True)
    return None


def main():
    for name in BEFORE:
        importlib.import_module(name)
    early = sorted(name for name in sys.modules if name.partition(".")[0] in NOT_BEFORE)
    assert not early, early
    gc.freeze()  # else a fork's collector looks at all that was imported here, and copies the memory that it is in
    arguments = serve()
    if arguments is None:
        return
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if arguments[0] == "-c":
        sys.argv = ["-c"]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
