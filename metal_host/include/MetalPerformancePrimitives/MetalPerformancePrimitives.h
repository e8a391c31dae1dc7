// Empty below Metal 4.0, as on a Mac. The declarations are in ../msl/matmul2d.h.
#include <metal_tensor>
