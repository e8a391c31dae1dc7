"""`flash_attn.utils.benchmark`: time, profile and measure a function with torch's own tools, on any device.

`fn` is called with `inputs` and `kwinputs`; where its result is a tuple, the first is meant. `amp` runs it under
autocast to `amp_dtype`. A timing function returns `(timer, measurement)` of `torch.utils.benchmark`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.benchmark as benchmark
from torch import Tensor


def benchmark_forward(
    fn: Callable[..., Any],
    *inputs: Any,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> tuple[Any, Any]:
    """Time the forward pass."""

    def run():
        with _autocast(inputs, amp, amp_dtype):
            fn(*inputs, **kwinputs)

    return _measure(run, repeats, f"{desc} - Forward pass", verbose)


def benchmark_backward(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> tuple[Any, Any]:
    """Time the backward pass alone, given `grad`, or random numbers."""
    y = _first_result(fn, inputs, kwinputs, amp, amp_dtype)
    grad = _grad_like(y, grad)

    def run():
        _forget_grads(inputs)
        y.backward(grad, retain_graph=True)

    return _measure(run, repeats, f"{desc} - Backward pass", verbose)


def benchmark_combined(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> tuple[Any, Any]:
    """Time the forward and backward pass together."""
    grad = _grad_like(_first_result(fn, inputs, kwinputs, amp, amp_dtype), grad)

    def run():
        _forget_grads(inputs)
        _first_result(fn, inputs, kwinputs, amp, amp_dtype).backward(grad, retain_graph=True)

    return _measure(run, repeats, f"{desc} - Forward + Backward pass", verbose)


def benchmark_fwd_bwd(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> tuple[Any, ...]:
    """Time the forward pass and the backward pass, each for itself."""
    options: dict[str, Any] = {"repeats": repeats, "desc": desc, "verbose": verbose, "amp": amp, "amp_dtype": amp_dtype}
    return (
        benchmark_forward(fn, *inputs, **options, **kwinputs),
        benchmark_backward(fn, *inputs, grad=grad, **options, **kwinputs),
    )


def benchmark_all(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> tuple[Any, ...]:
    """Time the forward pass, the backward pass, and both together."""
    options: dict[str, Any] = {"repeats": repeats, "desc": desc, "verbose": verbose, "amp": amp, "amp_dtype": amp_dtype}
    return (
        *benchmark_fwd_bwd(fn, *inputs, grad=grad, **options, **kwinputs),
        benchmark_combined(fn, *inputs, grad=grad, **options, **kwinputs),
    )


def pytorch_profiler(
    fn: Callable[..., Any],
    *inputs: Any,
    trace_filename: str | None = None,
    backward: bool = False,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    cpu: bool = False,
    verbose: bool = True,
    **kwinputs: Any,
) -> None:
    """Profile one call after thirty others, the backward pass too if `backward`; on the host if `cpu` or without CUDA.

    Prints a table if `verbose`, and writes a Chrome trace to `trace_filename`.
    """
    grad = None

    def run():
        nonlocal grad
        _forget_grads(inputs)
        out = _first_result(fn, inputs, kwinputs, amp, amp_dtype)
        if backward:
            grad = _grad_like(out, grad)
            out.backward(grad, retain_graph=True)

    for _ in range(30):
        run()
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] if cpu or not cuda else []
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # Python's frames, which a stack adds, would fill the table of the host.
    with torch.profiler.profile(activities=activities, record_shapes=True, with_stack=cuda) as profile:
        run()
    if verbose:
        print(profile.key_averages().table(row_limit=50))
    if trace_filename is not None:
        profile.export_chrome_trace(str(trace_filename))


def benchmark_memory(
    fn: Callable[..., Any], *inputs: Any, desc: str = "", verbose: bool = True, **kwinputs: Any
) -> float | None:
    """The greatest memory that torch held during a call, in units of 1000 MiB, as upstream counts."""
    if not torch.cuda.is_available():
        raise NotImplementedError("benchmark_memory: torch counts the greatest memory in use for CUDA only")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    fn(*inputs, **kwinputs)
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() / (2**20 * 1000)
    if verbose:
        print(f"{desc} max memory: {memory}GB")
    torch.cuda.empty_cache()
    return memory


def _measure(run, repeats, title, verbose):
    if verbose:
        print(title)
    timer = benchmark.Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads(), timer=_now)
    measurement = timer.timeit(repeats)
    if verbose:
        print(measurement)
    return timer, measurement


def _now():
    # The timer's own clock waits for CUDA and XPU, not for MPS.
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _autocast(inputs, amp, amp_dtype):
    device = next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")
    return torch.autocast(device, dtype=amp_dtype, enabled=amp)


def _first_result(fn, inputs, kwinputs, amp, amp_dtype):
    with _autocast(inputs, amp, amp_dtype):
        out = fn(*inputs, **kwinputs)
    return out[0] if type(out) is tuple else out


def _grad_like(y, grad):
    if grad is None:
        return torch.randn_like(y)
    if grad.shape != y.shape:
        raise ValueError(f"grad must have the shape of the result, {tuple(y.shape)}, got {tuple(grad.shape)}")
    return grad


def _forget_grads(inputs):
    for x in inputs:
        if isinstance(x, torch.Tensor):
            x.grad = None
