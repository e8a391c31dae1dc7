"""`utils.generation` with small models, against generation without a cache and against distributions."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flash_attn.modules.block import Block
from flash_attn.modules.embedding import GPT2Embeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.utils import generation
from flash_attn.utils.generation import GenerationMixin, decode, decode_speculative, sample, sample_speculative
from flash_attn_mps import trace
from tests.metal_tiers import metal_on

VOCAB = 17


class Model(nn.Module, GenerationMixin):
    """Two blocks with the call that `flash_attn.utils.generation` expects."""

    def __init__(self, use_flash_attn, seed=0, positions=40, **more):
        super().__init__()
        torch.manual_seed(seed)
        options = {"num_heads": 2, "causal": True, "use_flash_attn": use_flash_attn, "rotary_emb_dim": 8, **more}
        self.embeddings = GPT2Embeddings(32, VOCAB, positions)
        self.blocks = nn.ModuleList(
            Block(32, partial(MHA, layer_idx=i, **options), partial(Mlp, hidden_features=64)) for i in range(2)
        )
        self.head = nn.Linear(32, VOCAB)
        self.calls = []

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        self.calls.append(input_ids.shape[1])
        x, residual = self.embeddings(input_ids, position_ids), None
        for block in self.blocks:
            kwargs = {} if inference_params is None else {"inference_params": inference_params}
            x, residual = block(x, residual, mixer_kwargs=kwargs)
        x = 5 * (x + residual)
        return SimpleNamespace(logits=self.head(x[:, -num_last_tokens:] if num_last_tokens else x))


def greedy(model, ids, length):
    """Without a cache; also the logits of each step."""
    scores = []
    with torch.no_grad():
        while ids.shape[1] < length:
            scores.append(model(ids).logits[:, -1])
            ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, scores


@pytest.mark.parametrize("use_flash_attn", [False, True])
def test_greedy(use_flash_attn):
    model = Model(use_flash_attn).eval()
    ids = torch.randint(0, VOCAB, (3, 4))
    want, scores = greedy(model, ids, 15)
    assert len(set(want[0].tolist())) > 3
    model.calls.clear()
    out = decode(ids, model, 15, cg=True)
    assert model.calls == [4] + [1] * 10
    assert torch.equal(out.sequences, want)
    for got, expected in zip(out.scores, scores, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(ids, 15), want)
    full = model.generate(ids, 15, return_dict_in_generate=True, output_scores=True)
    assert len(full.scores) == 11
    assert model.generate(ids, 15, return_dict_in_generate=True).scores is None


def test_tokens_are_decoded_on_the_decode_kernel(monkeypatch):
    """Eight sequences, heads that share their keys, against the torch tier."""
    model = Model(True, positions=100, num_heads=4, num_heads_kv=2).eval()
    ids = torch.randint(0, VOCAB, (8, 70))
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "torch")
    expected = decode(ids, model, 76)
    monkeypatch.delenv("MTLFLASHATTN_KERNEL")
    monkeypatch.setattr(trace, "enabled", True)
    monkeypatch.setattr(trace, "calls", trace.Counter())
    with metal_on("cpu"):
        found = decode(ids, model, 76)
    tiers = [call.tier for call in trace.calls.elements()]
    assert (tiers.count("simdgroup"), tiers.count("decode")) == (2, 2 * 5)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_end_teacher_and_vocabulary(capsys):
    model = Model(True).eval()
    ids = torch.randint(0, VOCAB, (1, 4))
    want, _ = greedy(model, ids, 15)
    end = int(want[0, 7])
    first = int((want[0, 4:] == end).nonzero()[0]) + 4
    stopped = decode(ids, model, 15, eos_token_id=end, enable_timing=True).sequences
    assert torch.equal(stopped, want[:, : first + 1])
    assert "decoding time" in capsys.readouterr().out
    teacher = torch.randint(0, VOCAB, (1, 9))
    teacher[:, :4] = ids
    taught = decode(ids, model, 15, teacher_outputs=teacher).sequences
    assert torch.equal(taught[:, :9], teacher)
    assert torch.equal(taught, greedy(model, teacher, 15)[0])
    few = decode(ids, model, 15, vocab_size=5)
    assert few.sequences[:, 4:].max() < 5
    assert few.scores[0].shape == (1, 5)
    with pytest.raises(NotImplementedError, match="does not define allocate_inference_cache"):
        model.allocate_inference_cache(1, 2)


def frequencies(draw, n=20000):
    torch.manual_seed(0)
    return torch.bincount(draw(n).flatten(), minlength=6) / n


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 0}, 6),
        ({"top_k": 3}, 3),
        ({"top_k": 0, "top_p": 0.7}, 2),
        ({"top_k": 4, "top_p": 0.9, "temperature": 0.5}, 2),
        ({"top_k": 100, "temperature": 2.0}, 6),
    ],
)
def test_sample(options, kept):
    want = (LOGITS / options.get("temperature", 1.0))[:kept].softmax(0)
    logits = LOGITS.expand(20000, -1).clone()
    got = frequencies(lambda n: sample(logits, **options))
    torch.testing.assert_close(got[:kept], want, rtol=0, atol=0.015)
    assert not got[kept:].any()
    assert torch.equal(logits, LOGITS.expand(20000, -1))
    assert torch.equal(sample(logits[:3]), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="top_p must be at most 1"):
        sample(logits, top_k=0, top_p=1.5)


def test_filters():
    logits = torch.randn(2, 3, 9)
    filtered = logits.clone()
    generation.modify_logits_for_top_k_filtering(filtered, 4)
    assert (filtered.isfinite().sum(-1) == 4).all()
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])
    assert (filtered.amax(-1) == logits.amax(-1)).all()
    filtered = logits.clone()
    generation.modify_logits_for_top_p_filtering(filtered, 0.6)
    probs = logits.softmax(-1)
    kept = filtered.isfinite()
    total = (probs * kept).sum(-1)
    least = torch.where(kept, probs, 2.0).amin(-1)
    assert (total >= 0.6 - 1e-6).all()
    assert (total - least < 0.6 + 1e-6).all()
    unfiltered = logits.clone()
    generation.modify_logits_for_top_p_filtering(unfiltered, 0.0)
    assert torch.equal(unfiltered, logits)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 3}, {"top_k": 0, "top_p": 0.8, "temperature": 0.7}])
def test_speculative_samples_are_distributed_as_the_model(options):
    n = 20000
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS]).expand(n, -1, -1)
    draft_logits = torch.stack([LOGITS.roll(1), LOGITS.flip(0)]).expand(n, -1, -1)
    torch.manual_seed(1)
    draft = torch.stack([sample(draft_logits[:, i].clone(), **options) for i in range(2)], dim=1)
    tokens, count = sample_speculative(logits, draft_logits, draft, **options)
    assert tokens.shape == (n, 3)
    assert set(count.unique().tolist()) <= {1, 2, 3}
    for i in range(3):
        valid = tokens[count > i, i]
        want = frequencies(lambda n, i=i: sample(logits[:, i].clone(), **options))
        assert len(valid) > 1000
        got = torch.bincount(valid, minlength=6) / len(valid)
        torch.testing.assert_close(got, want, rtol=0, atol=0.04)
    # What was accepted is what was proposed.
    assert torch.equal(tokens[count > 1, 0], draft[count > 1, 0])


@pytest.mark.parametrize("lookahead", [1, 3, 6])
@pytest.mark.parametrize("length", [5, 6, 14])
def test_speculative_greedy_equals_greedy(lookahead, length, capsys):
    model, draft = Model(True).eval(), Model(True, seed=1).eval()
    ids = torch.randint(0, VOCAB, (1, 4))
    want, scores = greedy(model, ids, length)
    for other in (draft, model):
        out = decode_speculative(ids, model, other, length, speculative_lookahead=lookahead, enable_timing=True)
        assert torch.equal(out.sequences, want)
        torch.testing.assert_close(out.scores, torch.stack(scores, dim=1), rtol=1e-4, atol=1e-4)
    printed = capsys.readouterr().out
    # A model agrees with itself, so that it is called once for lookahead + 1 tokens.
    if length == 14:
        assert printed.count("Acceptance rate: 100.00%") >= 1
        assert f"Number of calls to main model: {-(-10 // (lookahead + 1))}\n" in printed


def test_malformed_calls():
    with pytest.raises(NotImplementedError, match="one sequence, got 2"):
        decode_speculative(torch.zeros(2, 3, dtype=torch.int64), None, None, 9)
    with pytest.raises(NotImplementedError, match="eos_token_id"):
        decode_speculative(torch.zeros(1, 3, dtype=torch.int64), None, None, 9, eos_token_id=1)
    logits = torch.randn(2, 4, 6)
    with pytest.raises(ValueError, match=r"logits_draft must be \(2, 3, 6\)"):
        sample_speculative(logits, logits, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens_draft must be \(2, 3\)"):
        sample_speculative(logits, logits[:, 1:], torch.zeros(2, 3))
    for function, arguments in ((generation.update_graph_cache, 5), (generation.capture_graph, 4)):
        with pytest.raises(NotImplementedError, match="CUDA graphs need CUDA"):
            function(*[None] * arguments)


def test_allocate_inference_cache():
    cache = generation.allocate_inference_cache(2, 7, 3, 8, 4, "cpu")
    assert list(cache) == [0, 1, 2, 3]
    assert cache[0].shape == (2, 7, 2, 3, 8)
    assert cache[0].dtype == torch.float16
    assert list(generation.allocate_inference_cache(2, 7, 3, 8, [5, 9], "cpu", torch.float32)) == [5, 9]
    with pytest.raises(ValueError, match="dtype must be"):
        generation.allocate_inference_cache(2, 7, 3, 8, 4, "cpu", torch.int8)
