// The rotary embedding of a pair of channels, with the roundings of apply_rotary in rotary.py.
#pragma once
#include "device.cuh"

// Turns a pair of channels; the sums are still to be rounded. The products are rounded before they are added: to float
// by the multiplication that may not be fused with the sum, then to DTYPE.
__device__ __forceinline__ void turn(float& first, float& second, float cos, float sin) {
    const float a = first, b = second;
    first = rounded<scalar_t>(__fmul_rn(a, cos)) - rounded<scalar_t>(__fmul_rn(b, sin));
    second = rounded<scalar_t>(__fmul_rn(b, cos)) + rounded<scalar_t>(__fmul_rn(a, sin));
}
