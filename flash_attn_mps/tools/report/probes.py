"""Small measurements from which everything about speed follows: what the GPU could do, and what a launch costs.

Each is a name and a text or a number with its unit; one that fails says why. Metal's own need Metal (`probes.metal`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ... import describe, timing
from ...tiers.metal import compiler, decode, launch, proved, simdgroup, tensorops, tensorops_probe
from ...tiers.metal.kernel import Kernel

_TEXT = Path(__file__).with_suffix(".metal")
_TENSOR_TEXT = Path(__file__).with_name("tensor_probes.metal")  # whose headers older systems have not
_REPEATS = 256
_TYPES = {"float16": "half", "bfloat16": "bfloat", "float32": "float"}
_HALVES = ("float16", "bfloat16")
_ROUNDS = 5
_KERNELS = ("attention_forward", "attention_decode")


def of(device: torch.device | str, watch: timing.Stopwatch, scale: float = 1.0) -> dict[str, Callable[[], str]]:
    """The probes by name. `scale`: of their sizes, 1 for a GPU."""
    probes: dict[str, Callable[[], str]] = {
        "memory, copied": lambda: _copied(device, watch, scale),
        **{f"torch's product, {t}": _bound(_matmul, device, watch, scale, t) for t in _TYPES},
        "a wait for the device": lambda: f"{_best(watch, lambda: timing.synchronize(device), 20) * 1e6:.1f} us",
    }
    if compiler.unavailable(str(device)) is not None:
        return probes
    kernels = list(_KERNELS)
    if tensorops_probe.layout() is not None:
        kernels.append(tensorops.FORWARD.entry)
        probes |= {f"16x32x16 products, {t}": _bound(_tensor_products, device, watch, scale, t) for t in _HALVES}
    return probes | {
        "Metal": lambda: _language(device),
        "lanes of an 8x8 matrix": lambda: _lanes(device),
        "a launch, on the host": lambda: _launch(device),
        "a launch, waited for": lambda: _waited_launch(device, watch),
        "multiply-adds, float32": lambda: _multiply_adds(device, watch, scale),
        **{f"8x8 products, {t}": _bound(_products, device, watch, scale, t) for t in _TYPES},
        **{
            f"{name}, {t}, head dim {d}": _bound(_pipeline, device, name, t, d)
            for name in kernels
            for t in (_HALVES if name == tensorops.FORWARD.entry else _TYPES)
            for d in (64, 128, 256)
        },
    }


def found(probe: Callable[[], str]) -> str:
    """What it says, or why it says nothing."""
    try:
        return probe()
    except Exception as error:  # whatever happens on somebody's machine belongs in the report
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _bound(function: Callable[..., str], *arguments: Any) -> Callable[[], str]:
    return lambda: function(*arguments)


def _best(watch: timing.Stopwatch, call: timing.Call, times: int) -> float:
    """Seconds of one call, of the fastest of a few rounds after one that does not count."""
    call()
    return min(watch(call, times) for _ in range(_ROUNDS))


def _copied(device: torch.device | str, watch: timing.Stopwatch, scale: float) -> str:
    x = torch.zeros(int(scale * (64 << 20)), dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    seconds = _best(watch, lambda: y.copy_(x), 2)
    return f"{2 * x.numel() * 4 / seconds / 1e9:.1f} GB/s, read and written"


def _matmul(device: torch.device | str, watch: timing.Stopwatch, scale: float, dtype: str) -> str:
    n = max(64, int(4096 * scale))
    x = torch.ones(n, n, dtype=getattr(torch, dtype), device=device)
    return f"{2 * n**3 / _best(watch, lambda: x @ x, 1) / 1e12:.2f} TF/s"


def _kernel(name: str, operand: str = "float", file: Path = _TEXT) -> Any:
    text = f"#define REPEATS {_REPEATS}\n#define T {operand}\n{file.read_text(encoding='ascii')}"
    return getattr(compiler.compile_shader(text), name)


def _language(device: torch.device | str) -> str:
    to = torch.zeros(4, device=device)
    _kernel("language")(to, torch.tensor([1.0, torch.inf], device=device), threads=[32], group_size=[32])
    version, tested, multiplied, width = to.tolist()
    honoured = "honoured" if tested and multiplied else "NOT honoured"
    return f"version {int(version)}, NaN and infinities {honoured}, simdgroups of {int(width)}"


def _lanes(device: torch.device | str) -> str:
    """fragment.metal, lane_of, counts on this order, which Metal's specification leaves open."""
    to = torch.full((8, 8), -1.0, device=device)
    _kernel("lanes")(to, threads=[32], group_size=[32])
    expected = torch.empty(8, 8)
    for index in range(32):
        row, column = (index >> 2 & 4) | (index >> 1 & 3), (index >> 1 & 4) | (index & 1) << 1
        expected[row, column], expected[row, column + 1] = 2 * index, 2 * index + 1
    found = to.cpu()
    return "in the order expected" if torch.equal(found, expected) else f"in ANOTHER order: {found.int().tolist()}"


def _launch(device: torch.device | str) -> str:
    kernel, to = _kernel("nothing"), torch.zeros(1, device=device)
    kernel(to, threads=[32], group_size=[32])
    timing.synchronize(device)
    begin = time.perf_counter()
    for _ in range(200):
        kernel(to, threads=[32], group_size=[32])
    seconds = time.perf_counter() - begin
    timing.synchronize(device)
    return f"{seconds / 200 * 1e6:.1f} us"


def _waited_launch(device: torch.device | str, watch: timing.Stopwatch) -> str:
    kernel, to = _kernel("nothing"), torch.zeros(1, device=device)
    return f"{_best(watch, lambda: kernel(to, threads=[32], group_size=[32]), 1) * 1e6:.1f} us"


def _multiply_adds(device: torch.device | str, watch: timing.Stopwatch, scale: float) -> str:
    kernel, to = _kernel("multiply_add"), torch.full((16,), 0.5, device=device)
    threads = max(64, int(scale * (1 << 21)) // 64 * 64)
    seconds = _best(watch, lambda: kernel(to, threads=[threads], group_size=[64]), 1)
    return f"{2 * 8 * _REPEATS * threads / seconds / 1e12:.2f} TF/s"


def _products(device: torch.device | str, watch: timing.Stopwatch, scale: float, dtype: str) -> str:
    kernel, to = _kernel("products", _TYPES[dtype]), torch.full((16,), 0.5, device=device)
    simdgroups = max(2, int(scale * (1 << 15)))
    seconds = _best(watch, lambda: kernel(to, threads=[32 * simdgroups], group_size=[64]), 1)
    return f"{2 * 8**3 * 8 * _REPEATS * simdgroups / seconds / 1e12:.2f} TF/s"


def _tensor_products(device: torch.device | str, watch: timing.Stopwatch, scale: float, dtype: str) -> str:
    kernel, to = _kernel("products", _TYPES[dtype], _TENSOR_TEXT), torch.full((2,), 0.5, device=device)
    simdgroups = max(2, int(scale * (1 << 13)))
    seconds = _best(watch, lambda: kernel(to, threads=[32 * simdgroups], group_size=[64]), 1)
    return f"{2 * 16 * 32 * 16 * 4 * _REPEATS * simdgroups / seconds / 1e12:.2f} TF/s"


def _pipeline(device: torch.device | str, name: str, dtype: str, head_dim: int) -> str:
    """What Metal makes of a default kernel for causal attention, and how long that and its proof take."""
    q, k = (torch.zeros(1, rows, 2, head_dim, dtype=getattr(torch, dtype), device=device) for rows in (1, 128))
    p = describe.dense(q, k, k, describe.CallOptions(causal=True))
    tensors: dict[str, torch.Tensor | None] = {"q": q, "k": k, "v": k, "out": q, "lse": None}
    kernel: Kernel
    tiled = {one.entry: one for one in (simdgroup.FORWARD, tensorops.FORWARD)}
    if name in tiled:
        kernel = tiled[name]
        variant = tiled[name].default(q.itemsize, head_dim, head_dim)
        if name == tensorops.FORWARD.entry:
            variant = tensorops.on_this_machine(variant)
    else:
        variant = next(decode.variants(p))
        kernel = decode.DECODE[variant.rows]
        tensors |= {"partial_o": None, "partial_m_l": None}
    specialization, _ = launch.arguments(kernel, p, variant, tensors, dict.fromkeys(kernel.parameters, 1))
    begin = time.perf_counter()
    compiled = getattr(compiler.compile_shader(specialization.source()), kernel.entry)
    seconds = time.perf_counter() - begin
    facts = [
        f"{variant}: {32 * variant.simdgroups} threads of {compiled.max_threads_per_threadgroup} at most",
        f"{compiled.static_thread_group_memory_length} bytes shared",
        f"compiled in {1e3 * seconds:.0f} ms",
    ]
    if kernel.proof is not None and proved.wanted() != "off":
        begin = time.perf_counter()
        refusal = kernel.proof(specialization, compiled)
        facts.append(refusal.why if refusal else f"proved in {1e3 * (time.perf_counter() - begin):.0f} ms")
    return ", ".join(facts)
