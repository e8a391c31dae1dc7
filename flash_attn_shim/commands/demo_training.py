"""`mtlflashattn demo --train`: the demo's model fine-tuned, its loss beside that of eager attention.

Neighbouring sentences of the README are pairs, and sentence-transformers' own loss (MultipleNegativesRankingLoss) wants
the embedding of a sentence to be nearer to its neighbour's than to those of the batch's other pairs.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

_PAIRS = 8  # of a batch
_LEARNING_RATE = 5e-5
_LIMIT = 1e-3
_ATTENTION = ("flash_attention_2", "eager")


def train(load: Callable[[str], Any], sentences: list[str], steps: int) -> int:
    """Train `load(attention)` for so many steps, with and without dropout; print both losses.

    Returns 0 if the losses without dropout are the same.
    """
    from flash_attn_mps import trace
    from flash_attn_mps.tools.progress import Progress

    batches = _batches(sentences, steps)
    print(
        f"Training: {steps} steps of {len(batches[0][0])} pairs of neighbouring sentences of the README, AdamW,"
        f" learning rate {_LEARNING_RATE:g}; with both attentions, without and with dropout"
    )
    losses: dict[tuple[bool, str], list[float]] = {}
    seconds: dict[tuple[bool, str], list[float]] = {}
    with Progress(4 * steps, "train") as progress:
        for dropout in (False, True):
            for attention in _ATTENTION:
                note = f"{attention}, {'with' if dropout else 'without'} dropout"
                losses[dropout, attention], seconds[dropout, attention] = [], []
                for loss, took in _run(load(attention), batches, dropout):
                    losses[dropout, attention].append(loss)
                    seconds[dropout, attention].append(took)
                    progress.step(f"{note}: loss {loss:.4f}")
    print(_table(losses, seconds))
    print("With dropout each run draws masks of its own: those losses are alike, not the same.")
    print(f"\nAttention calls\n{_calls()}")
    plain = [losses[False, attention] for attention in _ATTENTION]
    difference = max(abs(flash - eager) for flash, eager in zip(*plain, strict=True))
    fine = difference < _LIMIT and bool(trace.gradients)
    below = "below" if fine else "NOT below"
    print(f"\nLargest difference of the losses without dropout: {difference:.1e} ({below} {_LIMIT:g})")
    return 0 if fine else 1


def _batches(sentences, steps):
    """For each step the sentences and their neighbours: all pairs in turn, none twice in a batch."""
    pairs = list(zip(sentences[::2], sentences[1::2], strict=False))
    count = min(_PAIRS, len(pairs))
    return [
        tuple(zip(*(pairs[(step * count + n) % len(pairs)] for n in range(count)), strict=True))
        for step in range(steps)
    ]


def _run(model, batches, dropout):
    """A training loop as anybody writes it; yields (loss, seconds) of each step."""
    import torch
    from sentence_transformers.util import batch_to_device

    torch.manual_seed(0)
    model.train(dropout)
    prepared = getattr(model, "preprocess", None) or model.tokenize  # the name before version 6
    losses = import_module("sentence_transformers.losses")  # version 6 makes this name when it is asked for
    measure = losses.MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    for texts in batches:
        began = time.perf_counter()
        features = [batch_to_device(prepared(list(column)), model.device) for column in texts]
        optimizer.zero_grad()
        loss = measure(features, None)
        loss.backward()
        optimizer.step()
        yield loss.item(), time.perf_counter() - began


def _table(losses, seconds):
    from flash_attn_mps.text_table import aligned

    head = ("loss", "flash_attention_2", "eager", "difference", "flash_attention_2, dropout", "eager, dropout")
    rows = [
        (
            f"step {step}",
            f"{flash:.5f}",
            f"{eager:.5f}",
            f"{abs(flash - eager):.0e}",
            f"{dropped:.5f}",
            f"{eager_dropped:.5f}",
        )
        for step, (flash, eager, dropped, eager_dropped) in enumerate(zip(*losses.values(), strict=True), 1)
    ]
    # The first step compiles kernels.
    flash, eager, *dropped = (f"{1e3 * statistics.median(times[1:] or times):.0f} ms" for times in seconds.values())
    return aligned([head, *rows, ("time of a step", flash, eager, "", *dropped)], right=True)


def _calls():
    """The trace without lengths, of which there are many."""
    from flash_attn_mps import trace
    from flash_attn_mps.text_table import aligned

    counts: Counter[tuple[str, ...]] = Counter()
    for direction, calls in (("forward", trace.calls), ("backward", trace.gradients)):
        for call, count in calls.items():
            counts[call.features, direction, call.tier] += count
    return aligned([("features", "pass", "tier", "calls"), *((*what, count) for what, count in counts.items())])
