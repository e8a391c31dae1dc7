"""The attention `mps_fa`, beyond what `test_models` compares: what it takes a mask for, and what it refuses."""

import pytest
import torch
import transformers

from flash_attn_mps.integrations.transformers import attention, register


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


class Layer(torch.nn.Module):
    is_causal = True
    config = transformers.LlamaConfig()


def heads(queries=5, keys=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 8, generator=generator) for length in (queries, keys, keys)]


def reference(q, k, v, seen):
    """softmax(q k / sqrt(d)) v in float64, as `attention` returns it; seen: (batch, heads, queries, keys) or less."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return (torch.nan_to_num(scores.softmax(-1)) @ v).transpose(1, 2)


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def padding(keys=7):
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[1, :2] = False
    return mask


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_masks_of_four_dimensions(kind, is_causal):
    q, k, v = heads()
    seen = padding()[:, None, None] & (causal(5, 7) if is_causal else torch.ones(5, 7, dtype=torch.bool))
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    out, weights = attention(Layer(), q, k, v, mask, is_causal=is_causal)
    assert weights is None
    torch.testing.assert_close(out.double(), reference(q, k, v, seen), atol=1e-5, rtol=1e-5)


def test_a_padding_mask_of_a_static_cache_hides_what_is_not_written():
    q, k, v = heads()
    written = torch.ones(2, 6, dtype=torch.bool)
    out, _ = attention(Layer(), q, k, v, written)
    expected = reference(q, k[:, :, :6], v[:, :, :6], causal(5, 6))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_cross_attention_of_equal_lengths_keeps_its_queries():
    q, k, v = heads(7, 7)
    out, _ = attention(Layer(), q, k, v, padding(), is_causal=False)
    expected = reference(q, k, v, padding()[:, None, None])
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_packed_sequences_by_number():
    q, k, v = heads(7, 7)
    numbers = torch.tensor([[1, 1, 1, 2, 2, 3, 3], [0, 1, 1, 1, 1, 2, 2]])
    seen = causal(7, 7) & (numbers[:, None, :, None] == numbers[:, None, None, :]) & (numbers > 0)[:, None, :, None]
    out, _ = attention(Layer(), q, k, v, numbers)
    torch.testing.assert_close(out.double(), reference(q, k, v, seen), atol=1e-5, rtol=1e-5)


def test_lengths_given_by_the_collator():
    q, k, v = (x[:1] for x in heads(7, 7))
    numbers = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    lengths = torch.tensor([0, 3, 5, 7], dtype=torch.int32)
    given = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 3, "max_length_k": 3}
    out, _ = attention(Layer(), q, k, v, None, **given)
    seen = causal(7, 7) & (numbers[:, None] == numbers)
    torch.testing.assert_close(out.double(), reference(q, k, v, seen), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["s_aux", "head_mask", "position_bias"])
def test_what_it_cannot_honour_is_named(name):
    with pytest.raises(NotImplementedError, match=name):
        attention(Layer(), *heads(), None, **{name: torch.zeros(4)})


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 1, 5, 7).index_fill(3, torch.tensor([2]), 0.5), ~causal(5, 7)[None, None]]
)
def test_a_mask_that_says_more_is_refused(mask):
    with pytest.raises(NotImplementedError, match="attention_mask"):
        attention(Layer(), *heads(), mask)


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


def pair():
    config = transformers.LlamaConfig(**SIZES, initializer_range=0.3)
    models = []
    for implementation in ("eager", "mps_fa"):
        torch.manual_seed(0)
        models.append(transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation))
    return models


def test_packed_batches_train_as_with_eager():
    ids = torch.arange(12).reshape(2, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])
    gradients = []
    for model in pair():
        model.train()(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_static_cache_generates_as_with_eager():
    ids = torch.arange(1, 11).reshape(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for cache in ("dynamic", "static"):
        if cache == "static":
            options["cache_implementation"] = "static"
        expected, got = (m.eval().generate(ids, attention_mask=mask, **options) for m in pair())
        assert torch.equal(expected, got)


def test_a_mask_function_it_does_not_know_is_refused():
    from transformers import masking_utils

    from flash_attn_mps.integrations.transformers import mask

    either = masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k == 0)
    with pytest.raises(NotImplementedError, match="or_masks"):
        mask(1, 4, either, q_length=4)
