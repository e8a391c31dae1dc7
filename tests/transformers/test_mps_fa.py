"""The attention `mps_fa`, beyond what `test_models` compares: what it takes a mask for, and what it refuses."""

import inspect

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


def reference(q, k, v, seen, sinks=None, bias=0.0):
    """softmax(q k / sqrt(d) + bias) v in float64, as `attention` returns it; seen: (batch, heads, queries, keys) or
    less."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias).masked_fill(~seen, -torch.inf)
    if sinks is not None:  # one more key, whose value is zero
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)), -1)
        v = torch.cat((v, torch.zeros_like(v[..., :1, :])), -2)
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


@pytest.mark.parametrize("form", ["dense", "padded", "packed"])
def test_sinks_and_their_gradient(form):
    q, k, v = heads(7, 7)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    seen, mask, given = causal(7, 7), None, {}
    if form == "padded":
        mask = padding()
        seen = seen & mask[:, None, None] & mask[:, None, :, None]
    elif form == "packed":
        q, k, v = (x[:1] for x in (q, k, v))
        lengths, numbers = torch.tensor([0, 3, 5, 7], dtype=torch.int32), torch.tensor([0, 0, 0, 1, 1, 2, 2])
        given = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 3, "max_length_k": 3}
        seen = seen & (numbers[:, None] == numbers)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, sinks)]
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out, _ = attention(Layer(), q, k, v, mask, s_aux=sinks, **given)
    *exact_qkv, exact_sinks = exact_leaves
    exact = reference(*exact_qkv, seen, exact_sinks)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, leaves, dout)
    for got, want in zip(grads, torch.autograd.grad(exact, exact_leaves, dout.double()), strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, "padding", "numbers", "bool", "added"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_position_bias_and_its_gradient(mask, is_causal):
    """Beside any mask; longer than the keys, as for a static cache."""
    q, k, v = heads(7, 7)
    bias = torch.randn(1, 4, 7, 9, generator=torch.Generator().manual_seed(3))
    seen = causal(7, 7) if is_causal else torch.ones(7, 7, dtype=torch.bool)
    numbers = torch.tensor([[1, 1, 1, 2, 2, 3, 3], [0, 1, 1, 1, 1, 2, 2]])
    given = {"padding": padding(), "numbers": numbers, "bool": padding()[:, None, None].expand(2, 1, 7, 7)}.get(mask)
    added = torch.tensor(0.0)
    if mask == "padding":
        seen = seen & given[:, None, None] & (given[:, None, :, None] if is_causal else True)
    elif mask == "numbers":
        seen = seen & (numbers[:, None, :, None] == numbers[:, None, None]) & (numbers > 0)[:, None, :, None]
    elif mask == "bool":
        seen = given
    elif mask == "added":
        seen, given = torch.tensor(True), torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(4))
        added = given.double()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, bias)]
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out, _ = attention(Layer(), q, k, v, given, position_bias=bias, is_causal=is_causal)
    exact = reference(*exact_leaves[:3], seen, bias=exact_leaves[3][..., :7] + added)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, leaves, dout)
    for got, want in zip(grads, torch.autograd.grad(exact, exact_leaves, dout.double()), strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


LENGTHS = {"cu_seq_lens_q": torch.tensor([0, 7]), "cu_seq_lens_k": torch.tensor([0, 7])}


@pytest.mark.parametrize(
    ("error", "name", "given"),
    [
        (NotImplementedError, "head_mask", {"head_mask": torch.zeros(4)}),
        (NotImplementedError, "position_bias", {"position_bias": torch.zeros(1, 4, 5, 7), **LENGTHS}),
        (ValueError, "position_bias", {"position_bias": torch.zeros(4)}),
        (ValueError, "position_bias", {"position_bias": torch.zeros(1, 4, 5, 6)}),
        (ValueError, "position_bias", {"position_bias": torch.zeros(1, 3, 5, 7)}),
        (ValueError, "position_bias", {"position_bias": torch.zeros(1, 4, 5, 7, dtype=torch.float64)}),
    ],
)
def test_what_it_cannot_honour_is_named(error, name, given):
    with pytest.raises(error, match=f"^{name}: "):
        attention(Layer(), *heads(), None, **given)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_any_mask_of_four_dimensions_and_gradients(kind, with_sinks):
    """Masks that `causal`, windows and lengths cannot express; longer than the keys, as for a static cache."""
    generator = torch.Generator().manual_seed(2)
    mask = (
        torch.rand(2, 1, 5, 9, generator=generator) < 0.5
        if kind == "bool"
        else torch.randn(1, 4, 5, 9, generator=generator)
    )
    seen = mask[..., :7] if kind == "bool" else torch.tensor(True)
    bias = torch.tensor(0.0) if kind == "bool" else mask[..., :7]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    leaves = [tensor.requires_grad_() for tensor in heads()]
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out, _ = attention(Layer(), *leaves, mask, sliding_window=3, s_aux=sinks)
    exact = reference(*exact_leaves, seen, sinks, bias.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    dout = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad(out, leaves, dout)
    for got, want in zip(grads, torch.autograd.grad(exact, exact_leaves, dout.double()), strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 16}


def pair(model=transformers.LlamaForCausalLM, **options):
    config = model.config_class(**{**SIZES, "num_hidden_layers": 1, "initializer_range": 0.3, **options})
    models = []
    for implementation in ("eager", "mps_fa"):
        torch.manual_seed(0)
        models.append(model._from_config(config, attn_implementation=implementation))
    return models


@pytest.mark.parametrize("padded", [False, True])
def test_gpt_oss_trains_as_with_eager(padded):
    """Attention sinks in layers with and without a window, and what training does to them."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
    options = {"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, **layers}
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0
    gradients = []
    for model in pair(transformers.GptOssForCausalLM, **options):
        labels = ids.masked_fill(mask == 0, -100)
        model.train()(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradients[0][f"model.layers.{n}.self_attn.sinks"].abs().min() > 1e-7 for n in range(2))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_t5_trains_and_generates_as_with_eager(padded):
    """Its learned position bias, and what training does to it; cross attention; both caches."""
    options = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 16}
    config = transformers.T5Config(**options, dropout_rate=0.0, decoder_start_token_id=0)
    ids, labels = torch.arange(12).reshape(2, 6), torch.arange(10).reshape(2, 5)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 4:] = 0
    gradients, texts = [], []
    for implementation in ("eager", "mps_fa"):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=implementation)
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.eval()
        how = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        texts.append([model.generate(ids, **how, cache_implementation=cache) for cache in (None, "static")])
    learned = [name for name in gradients[0] if "relative_attention_bias" in name]
    assert len(learned) == 2
    assert all(gradients[0][name].abs().max() > 1e-5 for name in learned)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(*texts, strict=True))


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


@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_function_that_it_does_not_know(padded):
    """Here the first token is seen by all, and a window is a mask of the model's own."""
    from transformers import masking_utils

    either = masking_utils.or_masks(lambda b, h, q, k: q - k < 3, lambda b, h, q, k: k == 0)
    function = masking_utils.and_masks(masking_utils.causal_mask_function, either)
    ids = torch.arange(12).reshape(2, 6)
    given = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]) if padded else None
    model = pair()[1]
    make = masking_utils.create_causal_mask
    named = inspect.signature(make).parameters
    options = {"cache_position": torch.arange(6)} if "cache_position" in named else {}
    options["inputs_embeds" if "inputs_embeds" in named else "input_embeds"] = model.get_input_embeddings()(ids)
    made = make(config=model.config, attention_mask=given, past_key_values=None, and_mask_function=function, **options)
    row = torch.arange(6)
    seen = (row[:, None] >= row) & ((row[:, None] - row < 3) | (row == 0))
    expected = seen.expand(2, 1, 6, 6) if given is None else seen & given.bool()[:, None, None]
    assert made.dtype == torch.bool and torch.equal(made, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_chunked_attention_equals_eager(padded):
    """Llama 4: a query sees the keys of its own chunk."""
    options = {"num_local_experts": 2, "intermediate_size_mlp": 16, "num_hidden_layers": 2, "attention_chunk_size": 3}
    options |= {"no_rope_layers": [1, 0], "moe_layers": [1], "head_dim": 8, "num_key_value_heads": 1}
    kinds = ["chunked_attention", "full_attention"]
    models = pair(transformers.Llama4ForCausalLM, layer_types=kinds, **options)
    ids, mask = torch.arange(2, 16).reshape(2, 7), torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    expected, got = (model.eval()(ids, attention_mask=mask).logits[mask.bool()] for model in models)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    whole, _ = pair(transformers.Llama4ForCausalLM, layer_types=["full_attention"] * 2, **options)
    whole.load_state_dict(models[0].state_dict())
    assert (whole.eval()(ids, attention_mask=mask).logits[mask.bool()] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_a_model_compiles_to_one_graph(padded, window):
    ids, mask = torch.arange(2, 16).reshape(2, 7), torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    eager, ours = pair(transformers.MistralForCausalLM, sliding_window=window, num_key_value_heads=1)
    torch._dynamo.reset()
    compiled = torch.compile(ours.eval(), backend="eager", fullgraph=True)
    given = mask if padded else None
    expected, got = (
        m(ids, attention_mask=given, use_cache=False).logits[mask.bool()] for m in (eager.eval(), compiled)
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
