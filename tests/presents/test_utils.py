"""`utils.benchmark`, `utils.pretrained`, `utils.torch` and `utils.library`."""

import json

import pytest
import torch
from torch import nn
from torch.utils.benchmark import Measurement, Timer

from flash_attn.utils import benchmark
from flash_attn.utils.library import triton_op
from flash_attn.utils.pretrained import state_dict_from_pretrained
from flash_attn.utils.torch import custom_amp_decorator, custom_bwd, custom_fwd


def test_benchmarks(capsys):
    x = torch.randn(8, 8, requires_grad=True)
    calls = []

    def fn(x, factor=1):
        y = x @ x * factor
        calls.append((factor, y.dtype))
        y.register_hook(lambda grad: calls.append("backward"))
        return y, "a second result"

    timer, measurement = benchmark.benchmark_forward(fn, x, factor=3, repeats=4, desc="fn")
    assert isinstance(timer, Timer)
    assert isinstance(measurement, Measurement)
    assert measurement.median > 0
    assert "fn - Forward pass" in capsys.readouterr().out
    assert len(calls) >= 4
    assert set(calls) == {(3, torch.float32)}
    calls.clear()
    benchmark.benchmark_backward(fn, x, grad=torch.ones(8, 8), repeats=4, verbose=False)
    assert calls.count("backward") >= 4
    assert len(calls) - calls.count("backward") == 1
    assert torch.equal(x.grad, torch.ones(8, 8) @ x.T + x.T @ torch.ones(8, 8))
    calls.clear()
    benchmark.benchmark_combined(fn, x, repeats=4, verbose=False, amp=True, amp_dtype=torch.bfloat16)
    assert calls.count("backward") == calls.count((1, torch.bfloat16)) - 1
    assert capsys.readouterr().out == ""
    assert len(benchmark.benchmark_fwd_bwd(fn, x, repeats=1, verbose=False)) == 2
    assert len(benchmark.benchmark_all(fn, x, repeats=1, desc="all")) == 3
    printed = capsys.readouterr().out
    for title in ("Forward pass", "Backward pass", "Forward + Backward pass"):
        assert f"all - {title}" in printed
    with pytest.raises(ValueError, match=r"grad must have the shape of the result, \(8, 8\), got \(8,\)"):
        benchmark.benchmark_backward(fn, x, grad=torch.ones(8))


def test_profiler(tmp_path, capsys):
    x = torch.randn(8, 8, requires_grad=True)
    trace = tmp_path / "trace.json"
    benchmark.pytorch_profiler(lambda x: x @ x, x, backward=True, cpu=True, trace_filename=trace)
    assert "aten::mm" in capsys.readouterr().out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "MmBackward0" in names


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch counts memory for CUDA")
def test_memory_needs_cuda():
    with pytest.raises(NotImplementedError, match="CUDA only"):
        benchmark.benchmark_memory(lambda: None)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("shards", ["100GB", "1KB"])
def test_state_dict_from_pretrained(tmp_path, safe, shards):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = BertModel(config)
    if safe:
        model.save_pretrained(tmp_path, max_shard_size=shards)
    else:
        save_in_shards(model.state_dict(), tmp_path, 1 if shards == "100GB" else 3)
    assert (len([*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]) > 1) == (shards == "1KB")
    got = state_dict_from_pretrained(str(tmp_path), device="cpu", dtype=torch.float16)
    want = model.state_dict()
    assert got.keys() >= want.keys() - {"embeddings.position_ids", "embeddings.token_type_ids"}
    for name, tensor in got.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, want[name].half())


def save_in_shards(state_dict, folder, n):
    if n == 1:
        torch.save(state_dict, folder / "pytorch_model.bin")
        return
    names = list(state_dict)
    weight_map = {}
    for i in range(n):
        file = f"pytorch_model-{i + 1:05}-of-{n:05}.bin"
        torch.save({name: state_dict[name] for name in names[i::n]}, folder / file)
        weight_map |= dict.fromkeys(names[i::n], file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_no_weights(tmp_path):
    with pytest.raises(OSError, match="no weights found"):
        state_dict_from_pretrained(str(tmp_path))


class Scale(torch.autograd.Function):
    @staticmethod
    @custom_fwd
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    @custom_bwd
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad @ x.T + x.T @ grad


def test_custom_fwd_and_bwd():
    x = torch.randn(4, 4, requires_grad=True)
    (got,) = torch.autograd.grad(Scale.apply(x).sum(), x)
    (want,) = torch.autograd.grad((x @ x).sum(), x)
    torch.testing.assert_close(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        out = Scale.apply(x)
    assert out.dtype == torch.bfloat16
    (got,) = torch.autograd.grad(out.sum(), x)  # the backward pass runs under the same autocast
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    assert custom_amp_decorator(lambda **kwargs: kwargs, False)(a=1) == {"a": 1}
    assert custom_amp_decorator(lambda **kwargs: kwargs, True)().keys() == {"device_type"}
    assert isinstance(nn.Identity(), nn.Module)


def test_triton_op_is_refused():
    with pytest.raises(NotImplementedError, match="'x::y' is written in triton"):
        triton_op("x::y", mutates_args=())
