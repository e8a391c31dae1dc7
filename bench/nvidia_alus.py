"""The cost model of Apple's GPUs beside a second witness: the same kernels on an NVIDIA GPU with products on its ALUs.

    python bench/nvidia_alus.py prepare DIRECTORY     anywhere, with the test extra, torch 2.13, a CUDA toolkit
    python bench/nvidia_alus.py run DIRECTORY         with an NVIDIA GPU; Python and the driver are enough

On M1 to M4 matrix products run on the ordinary ALUs. So here: 16 multiplications and additions a lane for each
(METAL_HOST_ALU_MATRICES). An SM of an H200 and a core of an M1 both have four schedulers of 32 lanes. `run` gives a
lane 128 registers, as Apple's GPUs have, and times each kernel twice: as it is, and with so few groups on an SM as
an M1's core has room for ("m1"). Results are meaningless; inputs are constant. It prints the speed, its share of the
ALU peak, what the model says of M1 Max, and how the orders of the variants agree (Spearman's rank correlation).
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

HEADS, LENGTH, HEAD_DIMS = 66, 2048, (64, 128, 256)
TORCH_TILES = {64: (32, 32, 4), 128: (32, 16, 4), 256: (16, 8, 2)}
ROUNDS = 7
_SM_BYTES, _BLOCK_BYTES, _RESERVED = 228 << 10, 227 << 10, 1 << 10  # shared memory of compute capability 9.0
_HALF = 0x3800  # 0.5, in every element of device memory


def prepare(directory: Path) -> None:
    import os
    import re

    os.environ["METAL_HOST_ALU_MATRICES"] = "1"
    import torch

    from apple_model import kernels
    from apple_model.chips import CHIPS
    from apple_model.predict import Call, predict, resident
    from flash_attn_mps.describe import CallOptions, dense
    from flash_attn_mps.tiers.metal import launch, simdgroup
    from metal_host import compile_shader, nvidia

    directory.mkdir(parents=True, exist_ok=True)
    chip, call, found = CHIPS["M1 Max"], Call(1, HEADS, LENGTH, LENGTH), []

    def write(name, library, entry, values, shape, modelled) -> None:
        module = library.module(entry)
        threads = shape[1][0]
        file = f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.ptx"
        (directory / file).write_text(nvidia.for_group(module.ptx, threads, 128))
        spaces = {p.index: p.space for p in library.kernel(entry).arguments if not isinstance(p, str)}
        buffers = []
        for index, value in enumerate(values):
            if isinstance(value, torch.Tensor) and spaces.get(index) != "constant":
                buffers.append({"bytes": value.numel() * value.element_size()})
            else:
                buffers.append({"data": torch.as_tensor(value).contiguous().numpy().tobytes().hex()})
        shared = sum(int(n) for n in re.findall(r"^\.shared .*\[(\d+)\];", module.ptx, re.MULTILINE))
        head_dim = modelled.head_dim
        found.append(
            {
                **{"name": name, "file": file, "entry": module.entries[entry], "grid": shape[0], "group": shape[1]},
                **{
                    "buffers": buffers,
                    "shared": shared,
                    "head_dim": head_dim,
                    "m1_groups": resident(chip.core, modelled),
                },
                "predicted": predict(chip, modelled, call).share,
            }
        )
        print(f"{name}: {found[-1]['predicted']:.2f} of the peak predicted", flush=True)

    for head_dim in HEAD_DIMS:
        q = torch.empty(1, LENGTH, HEADS, head_dim, dtype=torch.float16, device="meta")
        p = dense(q, q, q, CallOptions())
        outputs = launch.outputs(p)
        tensors = {"q": p.q, "k": p.k, "v": p.v, "out": outputs.out, "lse": outputs.lse}
        for variant in simdgroup.FORWARD.fitting(2, head_dim, head_dim):
            if variant.simdgroups == 4 and variant.keys >= 16:
                specialization, values = launch.arguments(simdgroup.FORWARD, p, variant, tensors)
                library = compile_shader(specialization.source(), kernels=[])
                shape, modelled = simdgroup.FORWARD.grid(p, variant), kernels.ours(variant, "fp16", head_dim)
                write(f"D{head_dim} {variant}", library, simdgroup.FORWARD.entry, values, shape, modelled)
        tile = TORCH_TILES[head_dim]
        library, entry, values, shape = kernels.torch_launch(tile, "fp16", head_dim, False, HEADS, LENGTH)
        write(f"D{head_dim} torch", library, entry, values, shape, kernels.torchs(tile, "fp16", head_dim))
    (directory / "kernels.json").write_text(json.dumps(found))


class Arguments(ctypes.Structure):
    """As metal_host/include/msl/nvptx.h has it."""

    _fields_ = [("arguments", ctypes.c_uint64 * 31), ("grid", ctypes.c_uint32 * 3), ("group", ctypes.c_uint32 * 3)]


class Driver:
    """What of the CUDA driver is needed; raises RuntimeError with its words."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.multiprocessors = self.attribute(device, 16)
        self.hertz = 1e3 * self.attribute(device, 13)
        name = ctypes.create_string_buffer(100)
        self.call("cuDeviceGetName", name, 100, device)
        self.name = name.value.decode()

    def call(self, function: str, *arguments) -> None:
        if status := getattr(self.cuda, function)(*arguments):
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'unknown error').decode()}")

    def attribute(self, device: ctypes.c_int, number: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def memory(self, buffer: dict) -> int:
        data = bytes.fromhex(buffer.get("data", ""))
        size = -(-(len(data) or buffer["bytes"]) // 256) * 256
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        self.call("cuMemsetD16_v2", pointer, ctypes.c_ushort(_HALF), ctypes.c_size_t(size // 2))
        if data:
            self.call("cuMemcpyHtoD_v2", pointer, data, ctypes.c_size_t(len(data)))
        return pointer.value

    def function(self, ptx: bytes, entry: str) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ptx + b"\0")
        self.call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        return function

    def of_function(self, function: ctypes.c_void_p, number: int) -> int:
        value = ctypes.c_int()
        self.call("cuFuncGetAttribute", ctypes.byref(value), number, function)
        return value.value

    def milliseconds(self, function, blocks: list[int], threads: int, dynamic: int, pointers) -> float:
        """Of a launch with `dynamic` bytes of shared memory: the median of several, after one that does not count."""
        self.call("cuFuncSetAttribute", function, 8, dynamic)
        start, end, elapsed = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (start, end):
            self.call("cuEventCreate", ctypes.byref(event), 0)
        times = []
        for _ in range(ROUNDS + 1):
            self.call("cuEventRecord", start, None)
            self.call("cuLaunchKernel", function, *blocks, threads, 1, 1, dynamic, None, pointers, None)
            self.call("cuEventRecord", end, None)
            self.call("cuEventSynchronize", end)
            self.call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
            times.append(elapsed.value)
        return sorted(times[1:])[ROUNDS // 2]


def dynamic_bytes(groups: int, static: int) -> int:
    """Shared memory to ask for, so that no more than `groups` blocks are on a multiprocessor."""
    return max(0, min(_SM_BYTES // groups - _RESERVED, _BLOCK_BYTES) - static) // 128 * 128


def run(directory: Path) -> None:
    driver = Driver()
    peak = driver.multiprocessors * 256 * driver.hertz
    print(f"{driver.name}: {peak / 1e12:.1f} TF/s on its ALUs")
    ranks: dict[int, list[tuple[float, float, float]]] = {}
    for kernel in json.loads((directory / "kernels.json").read_text()):
        function = driver.function((directory / kernel["file"]).read_bytes(), kernel["entry"])
        grid, group = kernel["grid"], kernel["group"]
        arguments = Arguments(grid=(ctypes.c_uint32 * 3)(*grid), group=(ctypes.c_uint32 * 3)(*group))
        memory = [driver.memory(buffer) for buffer in kernel["buffers"]]
        arguments.arguments[: len(memory)] = memory
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        blocks = [-(-n // m) for n, m in zip(grid, group, strict=True)]
        threads = group[0] * group[1] * group[2]
        times = [
            driver.milliseconds(function, blocks, threads, dynamic, pointers)
            for dynamic in (0, dynamic_bytes(kernel["m1_groups"], kernel["shared"]))
        ]
        operations = 4 * HEADS * LENGTH**2 * kernel["head_dim"]
        free, m1 = (operations / (t / 1e3) for t in times)
        registers, spilled = driver.of_function(function, 4), driver.of_function(function, 3)
        print(
            f"{kernel['name']:26} {free / 1e12:5.1f} TF/s {free / peak:.2f}   m1 {m1 / 1e12:5.1f} {m1 / peak:.2f}   "
            f"model {kernel['predicted']:.2f}   r{registers} local {spilled}",
            flush=True,
        )
        if "torch" not in kernel["name"]:
            ranks.setdefault(kernel["head_dim"], []).append((free, m1, kernel["predicted"]))
        for pointer in memory:
            driver.call("cuMemFree_v2", ctypes.c_uint64(pointer))
    for head_dim, rows in ranks.items():
        free, m1 = (spearman([row[i] for row in rows], [row[2] for row in rows]) for i in (0, 1))
        print(f"D{head_dim}: rank correlation with the model {free:.2f}, m1 {m1:.2f} ({len(rows)} variants)")


def spearman(x: list[float], y: list[float]) -> float:
    n = len(x)
    if n < 2:
        return float("nan")
    order = [sorted(range(n), key=values.__getitem__) for values in (x, y)]
    places = [{item: place for place, item in enumerate(o)} for o in order]
    return 1 - 6 * sum((places[0][i] - places[1][i]) ** 2 for i in range(n)) / (n * (n * n - 1))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("prepare", "run"):
        raise SystemExit(__doc__)
    {"prepare": prepare, "run": run}[sys.argv[1]](Path(sys.argv[2]))
