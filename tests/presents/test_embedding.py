"""`modules.embedding` and `layers.patch_embed` against look-ups and loops."""

import copy
import pickle

import pytest
import torch

from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.modules.embedding import (
    BertEmbeddings,
    ColumnParallelEmbedding,
    GPT2Embeddings,
    ParallelGPT2Embeddings,
    VocabParallelEmbedding,
)

from .reference import assert_close

IDS = torch.tensor([[3, 1, 7], [0, 7, 2]])
POSITIONS = torch.tensor([[2, 0, 1], [4, 4, 3]])


def copies(module):
    return module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("positions", [0, 5])
@pytest.mark.parametrize("project", [None, 4])
def test_gpt2_embeddings(positions, project):
    module = GPT2Embeddings(6, 8, positions, word_embed_proj_dim=project, padding_idx=7)
    names = ["word_embeddings.weight", *(["project_in.weight"] if project else [])]
    names += ["position_embeddings.weight"] if positions else []
    assert list(module.state_dict()) == names
    words = module.word_embeddings.weight[IDS]
    assert not words[IDS == 7].any()
    if project:
        words = words @ module.project_in.weight.T
    for other in copies(module):
        for position_ids, index in ((None, torch.arange(3)), (POSITIONS, POSITIONS)):
            want = words + (module.position_embeddings.weight[index] if positions else 0)
            assert_close(other(IDS, position_ids), want)


@pytest.mark.parametrize("positions", [0, 5])
@pytest.mark.parametrize("types", [0, 2])
def test_bert_embeddings(positions, types):
    module = BertEmbeddings(6, 8, positions, types)
    token_types = torch.tensor([[0, 1, 1], [1, 0, 0]])
    for other in copies(module):
        for position_ids, index in ((None, torch.arange(3)), (POSITIONS, POSITIONS)):
            for type_ids in (None, token_types):
                want = module.word_embeddings.weight[IDS]
                want = want + (module.position_embeddings.weight[index] if positions else 0)
                if types:
                    want = want + module.token_type_embeddings.weight[0 if type_ids is None else type_ids]
                assert_close(other(IDS, position_ids, type_ids), want)


def embed(rank, group, words, positions, sequence_parallel, combine):
    n = group.size()
    module = ParallelGPT2Embeddings(8, 8, 6, group, sequence_parallel=sequence_parallel)
    with torch.no_grad():
        module.word_embeddings.weight.copy_(words.chunk(n)[rank])
        module.position_embeddings.weight.copy_(positions.chunk(n, dim=1)[rank])
    out = module(IDS.repeat(2, 1), combine_batch_seqlen_dim=combine)
    grad = torch.ones(4, 3, 8).flatten(0, 1) if combine else torch.ones(4, 3, 8)
    out.backward(grad.chunk(n)[rank] if sequence_parallel else grad)
    with pytest.raises(ValueError, match="num_embeddings must be divisible"):
        VocabParallelEmbedding(7, 4, process_group=group)
    with pytest.raises(ValueError, match="embedding_dim must be divisible"):
        ColumnParallelEmbedding(8, 3, process_group=group)
    with pytest.raises(NotImplementedError, match="padding_idx"):
        VocabParallelEmbedding(8, 4, process_group=group, padding_idx=0)
    return out.detach(), module.word_embeddings.weight.grad, module.position_embeddings.weight.grad


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("sequence_parallel", "combine"), [(True, True), (True, False), (False, False)])
def test_parallel_embeddings(pool, world_size, sequence_parallel, combine):
    words, positions = torch.randn(8, 8), torch.randn(6, 8)
    want = words[IDS.repeat(2, 1)] + positions[:3]
    want = want.flatten(0, 1) if combine else want
    counts = torch.bincount(IDS.flatten(), minlength=8) * 2.0
    results = pool.run(world_size, embed, words, positions, sequence_parallel, combine)
    for rank, (out, words_grad, positions_grad) in enumerate(results):
        assert_close(out, want.chunk(world_size)[rank] if sequence_parallel else want)
        assert_close(words_grad, counts.chunk(world_size)[rank][:, None].expand(-1, 8))
        seen = torch.tensor([4.0, 4, 4, 0, 0, 0])
        assert_close(positions_grad, seen[:, None].expand(-1, 8 // world_size))


def test_parallel_embeddings_without_a_group():
    plain = VocabParallelEmbedding(8, 4)
    assert torch.equal(plain(IDS), plain.weight[IDS])
    assert ColumnParallelEmbedding(8, 4).weight.shape == (8, 4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_patch_embed(fused, flatten):
    module = PatchEmbed((8, 12), (4, 3), in_chans=2, embed_dim=5, flatten=flatten, fused_bias_fc=fused)
    assert list(module.state_dict()) == ["proj.weight", "proj.bias"]
    assert (module.grid_size, module.num_patches) == ((2, 4), 8)
    x = torch.randn(3, 2, 8, 12)
    want = torch.nn.functional.conv2d(
        x.double(), module.proj.weight.double().view(5, 2, 4, 3), module.proj.bias.double(), stride=(4, 3)
    ).permute(0, 2, 3, 1)
    for other in copies(module):
        assert_close(other(x), want.flatten(1, 2) if flatten else want, scale=4)
    normed = PatchEmbed(8, 4, embed_dim=5, norm_layer=torch.nn.LayerNorm, bias=False)
    assert list(normed.state_dict()) == ["proj.weight", "norm.weight", "norm.bias"]
    assert normed(torch.randn(1, 3, 8, 8)).mean(-1).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"x must be images of height and width \(8, 12\), got \(8, 8\)"):
        module(torch.randn(1, 2, 8, 8))
