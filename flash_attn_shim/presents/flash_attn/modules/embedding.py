"""`flash_attn.modules.embedding`: embeddings of tokens, positions and token types, alone and over a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_attn.utils.distributed import all_reduce, reduce_scatter


class GPT2Embeddings(nn.Module):
    """Word and position embeddings.

    Args:
        max_position_embeddings: not positive for none.
        word_embed_proj_dim: if given, words are embedded in so many dimensions and projected to `embed_dim`.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: int | None = None,
        word_embed_proj_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        word_dim = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(vocab_size, word_dim, padding_idx=padding_idx, **factory)
        self.project_in = None
        if word_embed_proj_dim is not None:
            self.project_in = nn.Linear(word_dim, embed_dim, bias=False, **factory)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Embeddings `(batch, seqlen, embed_dim)` of `input_ids` and `position_ids`, `(batch, seqlen)` each."""
        embeddings = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        return embeddings


class BertEmbeddings(nn.Module):
    """Word, position and token type embeddings; of the last two, none where their number is not positive."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx, **factory)
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, embed_dim, **factory)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Embeddings `(batch, seqlen, embed_dim)` of ids `(batch, seqlen)`; the token type is 0 unless given."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        if self.type_vocab_size > 0:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(input_ids)
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return embeddings


class VocabParallelEmbedding(nn.Embedding):
    """An embedding of which each rank holds a part of the vocabulary; other words give zeros, for the caller to sum."""

    def __init__(
        self,
        num_embeddings: int,
        *args: Any,
        process_group: dist.ProcessGroup | None = None,
        padding_idx: int | None = None,
        **kwargs: Any,
    ) -> None:
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        if num_embeddings % world_size:
            raise ValueError(f"num_embeddings must be divisible by the world size {world_size}, got {num_embeddings}")
        if world_size > 1 and padding_idx is not None:
            raise NotImplementedError("padding_idx is not supported over a process group, upstream neither")
        kwargs["padding_idx"] = padding_idx
        super().__init__(num_embeddings // world_size, *args, **kwargs)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        if self.process_group is None:
            return super().forward(input)
        local = input - dist.get_rank(self.process_group) * self.num_embeddings
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        return super().forward(local.masked_fill(elsewhere, 0)).masked_fill(elsewhere[..., None], 0.0)


class ColumnParallelEmbedding(nn.Embedding):
    """An embedding of which each rank holds a part of the dimensions."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *args: Any,
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        if embedding_dim % world_size:
            raise ValueError(f"embedding_dim must be divisible by the world size {world_size}, got {embedding_dim}")
        super().__init__(num_embeddings, embedding_dim // world_size, *args, **kwargs)
        self.process_group = process_group


class ParallelGPT2Embeddings(nn.Module):
    """`GPT2Embeddings` over a process group: words by vocabulary, positions by dimension, and their sum reduced."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        process_group: dist.ProcessGroup,
        padding_idx: int | None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"process_group": process_group, "device": device, "dtype": dtype}
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(vocab_size, embed_dim, padding_idx=padding_idx, **options)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(max_position_embeddings, embed_dim, **options)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, combine_batch_seqlen_dim: bool = False
    ) -> Tensor:
        """Embeddings of ids `(batch, seqlen)`: `(batch, seqlen, embed_dim)`, or `(batch * seqlen, embed_dim)`.

        With `sequence_parallel` over several ranks, this rank's part of the first axis.
        """
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            positions = self.position_embeddings(_positions(input_ids, position_ids))
            # Zeros where the other ranks have their dimensions.
            before = dist.get_rank(self.process_group) * positions.shape[-1]
            after = embeddings.shape[-1] - before - positions.shape[-1]
            embeddings = embeddings + nn.functional.pad(positions, (before, after))
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        if dist.get_world_size(self.process_group) == 1:
            return embeddings
        reduce = reduce_scatter if self.sequence_parallel else all_reduce
        return reduce(embeddings, self.process_group)


def _positions(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    if position_ids is not None:
        return position_ids
    return torch.arange(input_ids.shape[1], device=input_ids.device)
