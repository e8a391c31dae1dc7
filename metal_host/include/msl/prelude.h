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
#ifdef __MH_MATRICES
#include "matrix.h"
#endif
#include "math.h"
#include "integer.h"
#include "simdgroup.h"
#include "simdgroup_matrix.h"
#include "atomic.h"
#ifdef __MH_TENSORS
#include "tensor.h"
#include "cooperative_tensor.h"
#include "matmul2d.h"
#endif
#ifdef __MH_LOGGING
#include "logging.h"
#endif
#ifdef __MH_INTERNALS
#include "internals.h"
#endif
#pragma clang attribute pop
