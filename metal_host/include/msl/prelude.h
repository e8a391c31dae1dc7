// What stands before every preprocessed source.
#pragma once
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#define __MH_UNPACK(...) __VA_ARGS__
// In the tables of the instrumented build, what happens inside the library happens at the call.
#pragma clang attribute push(__attribute__((nodebug)), apply_to = hasType(functionType))
#include "types.h"
#ifdef __NVPTX__
#include "nvptx.h"
#else
#include "cpu.h"
#endif
#include "traits.h"
#include "matrix.h"
#include "math.h"
#include "integer.h"
#include "simdgroup.h"
#include "simdgroup_matrix.h"
#include "atomic.h"
#include "logging.h"
#include "internals.h"
#pragma clang attribute pop
