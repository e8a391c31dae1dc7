"""`flash_attn.utils.generation`: greedy, sampled and speculative decoding with a cache of keys and values.

A model here is called as `model(input_ids, position_ids=..., inference_params=..., num_last_tokens=...)` and returns an
object with `logits` `(batch, num_last_tokens, vocab_size)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class GreedySearchDecoderOnlyOutput:
    """`sequences` `(batch, length)` and `scores`, the logits from which each new token was taken."""

    sequences: Tensor
    scores: Any = None


@dataclass
class SampleDecoderOnlyOutput(GreedySearchDecoderOnlyOutput):
    """The same for sampling."""


@dataclass
class InferenceParams:
    """What the layers of a model share while they generate.

    Attributes:
        max_seqlen, max_batch_size: how much each cache holds.
        seqlen_offset: tokens in the cache.
        batch_size_offset: the first sequence of the cache that the batch stands for.
        key_value_memory_dict: from `layer_idx` to a cache `(max_batch_size, max_seqlen, 2, nheads, head_dim)`.
        lengths_per_sample: `(batch,)` int32, tokens in the cache for each sequence where they differ.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set all but the `top_k` greatest of the last axis to -inf, in place."""
    least = logits.topk(top_k).values[..., -1:]
    logits.masked_fill_(logits < least, float("-inf"))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Keep the most probable of the last axis that together reach probability `top_p`; the others to -inf, in place.

    `top_p` not between 0 and 1 keeps all.
    """
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ordered, order = logits.sort(descending=False)
    remove = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    logits.masked_fill_(remove.scatter(-1, order, remove), float("-inf"))


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """A token `(batch,)` for each row of `logits` `(batch, vocab_size)`.

    Args:
        top_k: 1 takes the greatest; 0 does not limit the candidates.
        top_p: after `top_k`; see `modify_logits_for_top_p_filtering`.
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    _check_top_p(top_p)
    if top_k > 0:
        logits, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    logits = logits / temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    choice = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
    return (tokens.gather(-1, choice) if top_k > 0 else choice).squeeze(-1)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
) -> GreedySearchDecoderOnlyOutput:
    """Continue `input_ids` `(batch, seqlen)` up to `max_length` tokens, or until all sequences just gave
    `eos_token_id`.

    Args:
        top_k, top_p, temperature: see `sample`.
        teacher_outputs: `(batch, length)`; as far as it goes, the tokens that are taken instead of sampled ones.
        vocab_size: only so many of the logits count.
        cg: upstream's CUDA graphs; without effect, the tokens are the same.
        enable_timing: print how long it took.

    Returns:
        An object with `sequences` `(batch, length)` and `scores`, a tuple of `(batch, vocab_size)`.
    """
    batch = input_ids.shape[0]
    params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    taught = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    start = _now(tensor_parallel) if enable_timing else 0.0

    scores, sequences = [], [input_ids]
    while True:
        scores.append(_logits(model, sequences[-1], params, 1, vocab_size).squeeze(1))
        params.seqlen_offset += sequences[-1].shape[1]
        if teacher_outputs is not None and params.seqlen_offset < taught:
            token = teacher_outputs[:, params.seqlen_offset]
        else:
            token = sample(scores[-1], top_k=top_k, top_p=top_p, temperature=temperature)
        sequences.append(token[:, None])
        if params.seqlen_offset >= max_length - 1:
            break
        if eos_token_id is not None and bool((token == eos_token_id).all()):
            break

    if enable_timing:
        print(f"Prompt processing + decoding time: {(_now(tensor_parallel) - start) * 1000:.0f}ms")
    return _output(torch.cat(sequences, dim=1), tuple(scores), top_k)


def sample_speculative(
    logits: Tensor,
    logits_draft: Tensor,
    tokens_draft: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Accept or replace the tokens of a draft model, so that they are distributed as the model's own
    (arXiv:2211.17192).

    Args:
        logits: `(batch, seqlen + 1, vocab_size)`, the model's. logits_draft: `(batch, seqlen, vocab_size)`.
        tokens_draft: `(batch, seqlen)`, int32 or int64.

    Returns:
        tuple: tokens `(batch, seqlen + 1)`, and how many of each row count, `(batch,)`, from 1 to seqlen + 1.
    """
    batch, seqlen, vocab_size = logits.shape[0], logits.shape[1] - 1, logits.shape[2]
    if logits_draft.shape != (batch, seqlen, vocab_size):
        raise ValueError(f"logits_draft must be {(batch, seqlen, vocab_size)}, got {tuple(logits_draft.shape)}")
    if tokens_draft.shape != (batch, seqlen) or tokens_draft.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"tokens_draft must be {(batch, seqlen)}, int32 or int64, "
            f"got {tuple(tokens_draft.shape)}, {tokens_draft.dtype}"
        )
    _check_top_p(top_p)

    def probabilities(logits):
        logits = logits / temperature  # a copy, for the filters to write to
        if top_k > 0:
            modify_logits_for_top_k_filtering(logits, min(top_k, vocab_size))
        modify_logits_for_top_p_filtering(logits, top_p)
        return logits.softmax(dim=-1)

    probs, probs_draft = probabilities(logits), probabilities(logits_draft)
    index = tokens_draft.long()[..., None]
    p, p_draft = probs[:, :-1].gather(-1, index).squeeze(-1), probs_draft.gather(-1, index).squeeze(-1)
    accepted = torch.rand(batch, seqlen, device=probs.device) * p_draft <= p
    n_accepted = accepted.int().cumprod(dim=-1).sum(dim=-1)

    # The token after the accepted ones: from what the model has more of than the draft, or, after all, from the model.
    rest = torch.cat([(probs[:, :-1] - probs_draft).clamp(min=0.0), probs[:, -1:]], dim=1)
    rest = rest.gather(1, n_accepted[:, None, None].expand(-1, 1, vocab_size)).squeeze(1)
    replacement = torch.multinomial(rest, num_samples=1).to(tokens_draft.dtype)
    tokens = F.pad(tokens_draft, (0, 1)).scatter(1, n_accepted[:, None], replacement)
    return tokens, n_accepted + 1


@torch.inference_mode()
def decode_speculative(
    input_ids: Tensor,
    model: Any,
    model_draft: Any,
    max_length: int,
    speculative_lookahead: int = 3,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
    debug: bool = False,
) -> GreedySearchDecoderOnlyOutput:
    """`decode` with a draft model that proposes `speculative_lookahead` tokens at a time; for one sequence.

    `eos_token_id` is not supported, upstream neither; `cg` and `debug` have no effect.

    Returns:
        An object with `sequences` `(1, length)` and `scores` `(1, new tokens, vocab_size)`.
    """
    if input_ids.shape[0] != 1:
        raise NotImplementedError(f"decode_speculative: input_ids must hold one sequence, got {input_ids.shape[0]}")
    if eos_token_id is not None:
        raise NotImplementedError("decode_speculative: eos_token_id is not supported")
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    params = InferenceParams(max_seqlen=max_length, max_batch_size=1)
    params_draft = InferenceParams(max_seqlen=max_length, max_batch_size=1)
    start = _now(tensor_parallel) if enable_timing else 0.0

    tokens, scores = input_ids, []
    calls, proposed, accepted = 0, 0, 0
    while True:
        # Both models see what they have not seen yet: the tokens after their offset.
        n_draft = min(speculative_lookahead, max_length - tokens.shape[1] - 1)
        length = tokens.shape[1]
        draft, draft_scores = tokens, []
        for _ in range(n_draft):
            new = draft[:, params_draft.seqlen_offset :]
            draft_scores.append(_logits(model_draft, new, params_draft, 1, vocab_size))
            params_draft.seqlen_offset = draft.shape[1]
            token = sample(draft_scores[-1][:, -1], **options)
            draft = torch.cat([draft, token[:, None]], dim=1)
        logits = _logits(model, draft[:, params.seqlen_offset :], params, max(n_draft, 0) + 1, vocab_size)
        calls += 1
        if n_draft > 0:
            new, kept = sample_speculative(logits, torch.cat(draft_scores, dim=1), draft[:, length:], **options)
            count = int(kept)
            proposed, accepted = proposed + n_draft, accepted + count - 1
        else:
            new, count = sample(logits[:, -1], **options)[:, None], 1
        tokens = torch.cat([tokens, new[:, :count]], dim=1)
        scores.append(logits[:, :count])
        # Of the tokens that were refused, the caches forget. The last one has been seen by neither.
        params.seqlen_offset = tokens.shape[1] - 1
        params_draft.seqlen_offset = min(params_draft.seqlen_offset, params.seqlen_offset)
        if params.seqlen_offset >= max_length - 1:
            break

    if enable_timing:
        print(f"Prompt processing + decoding time: {(_now(tensor_parallel) - start) * 1000:.0f}ms")
        print(f"Number of calls to main model: {calls}")
        print(f"Acceptance rate: {100 * accepted / max(proposed, 1):.2f}%")
    return _output(tokens, torch.cat(scores, dim=1), top_k)


class GenerationMixin:
    """`generate` for a model with the call of this module."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[Any, Any]:
        raise NotImplementedError(f"{type(self).__name__} does not define allocate_inference_cache")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> GreedySearchDecoderOnlyOutput | Tensor:
        """`decode`; only the sequences unless `return_dict_in_generate`, and scores only if `output_scores`."""
        output = decode(input_ids, self, max_length, top_k=top_k, top_p=top_p, temperature=temperature, **kwargs)
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences


def allocate_inference_cache(
    max_batch_size: int,
    max_seqlen: int,
    nheads: int,
    headdim: int,
    layers: int | Sequence,
    device: torch.device | str | None,
    dtype: torch.dtype | None = torch.float16,
) -> dict[Any, Any]:
    """`{layer: empty cache}` for `layers`, a number or the `layer_idx` themselves; see `InferenceParams`."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    shape = (max_batch_size, max_seqlen, 2, nheads, headdim)
    layers = range(layers) if isinstance(layers, int) else layers
    return {layer: torch.empty(shape, device=device, dtype=dtype) for layer in layers}


@dataclass
class DecodingCGCache:
    """What upstream keeps of captured CUDA graphs."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device = None
    dtype = None
    callables: dict = field(default_factory=dict)
    mempool = None
    inference_params: InferenceParams | None = None
    run: Callable | None = None


def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Sequence[int] = (1,),
    tensor_parallel: int = 1,
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> NoReturn:
    """Upstream captures CUDA graphs here."""
    raise NotImplementedError("update_graph_cache: CUDA graphs need CUDA; decode() does without them")


def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> NoReturn:
    """Upstream captures a CUDA graph here."""
    raise NotImplementedError("capture_graph: CUDA graphs need CUDA; decode() does without them")


def _logits(model, input_ids, params, num_last_tokens, vocab_size):
    """Logits `(batch, num_last_tokens, vocab_size)` of the last of `input_ids`, which follow what the cache holds."""
    position_ids = None
    if params.seqlen_offset > 0:
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        position_ids = (params.seqlen_offset + steps).expand(input_ids.shape[0], -1)
    logits = model(
        input_ids, position_ids=position_ids, inference_params=params, num_last_tokens=num_last_tokens
    ).logits
    return logits if vocab_size is None else logits[..., :vocab_size]


def _output(sequences, scores, top_k):
    output = GreedySearchDecoderOnlyOutput if top_k == 1 else SampleDecoderOnlyOutput
    return output(sequences=sequences, scores=scores)


def _now(tensor_parallel):
    if tensor_parallel > 1:
        torch.distributed.barrier()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _check_top_p(top_p):
    if top_p > 1.0:
        raise ValueError(f"top_p must be at most 1, got {top_p}")
