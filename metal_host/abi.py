"""The structures of runtime/runtime.h, for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int64, c_uint32, c_uint64, c_void_p

MAX_BUFFERS = 31
MAX_THREADS = 1024
MAX_REPORTS = 64
MAX_THREADGROUP_BYTES = 32 << 10
SPACES = ("device", "constant", "threadgroup", "stack")


class ThreadgroupRecord(ctypes.Structure):
    _fields_ = [("address", c_uint64), ("size", c_uint64), ("number", c_uint64), ("unused", c_uint64)]


class Region(ctypes.Structure):
    _fields_ = [("start", c_uint64), ("end", c_uint64), ("space", c_uint32), ("id", c_uint32), ("shadow", c_void_p)]


COUNTERS = (
    "device_bytes_read",
    "device_bytes_written",
    "constant_bytes_read",
    "threadgroup_bytes_read",
    "threadgroup_bytes_written",
    "threadgroup_barriers",
    "simdgroup_barriers",
    "matrix_products",
    "shuffles",
    "reductions",
    "transcendentals",
    "atomics",
    "switches",
)


class Counters(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in COUNTERS]


class Report(ctypes.Structure):
    _fields_ = [
        ("fault", c_uint32),
        ("kind", c_uint32),
        ("size", c_uint32),
        ("write", c_uint32),
        ("thread", c_uint32),
        ("other_thread", c_uint32),
        ("group", c_uint32 * 3),
        ("other_write", c_uint32),
        ("site", c_uint64),
        ("other_site", c_uint64),
        ("address", c_uint64),
        ("mask", c_uint64),
        ("index", c_int64),
        ("source", c_uint64),
        ("region", c_uint32),
        ("near_region", c_uint32),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("entry", c_void_p),
        ("arguments", c_uint64 * MAX_BUFFERS),
        ("threadgroup_arguments", c_uint64 * MAX_BUFFERS),
        ("grid", c_uint32 * 3),
        ("group", c_uint32 * 3),
        ("seed", c_uint64),
        ("stacks", c_void_p),
        ("stack_size", c_uint64),
        ("variables", POINTER(ThreadgroupRecord)),
        ("variable_count", c_uint64),
        ("regions", POINTER(Region)),
        ("region_count", c_uint64),
        ("shadow_memory", c_void_p),
        ("shadow_size", c_uint64),
        ("shadow_used", c_uint64),
        ("sites", POINTER(c_uint64)),
        ("site_lines", POINTER(c_uint32)),
        ("site_count", c_uint64),
        ("allow_partial_collectives", c_uint32),
        ("lockstep", c_uint32),
        ("report_count", c_uint32),
        ("layout", c_uint32),
        ("counters", Counters),
        ("reports", Report * MAX_REPORTS),
    ]


class UbsanLocation(ctypes.Structure):
    _fields_ = [("file", c_char_p), ("line", c_uint32), ("column", c_uint32)]
