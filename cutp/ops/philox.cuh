// Random bits by Philox4x32-10, and Gumbel noise of them. Specification: philox.py.
#pragma once
#include "device.cuh"

__device__ __forceinline__ uint4 philox4x32(uint4 counter, u64 key) {
    u32 k0 = static_cast<u32>(key), k1 = static_cast<u32>(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 high0 = __umulhi(counter.x, 0xd2511f53u), low0 = counter.x * 0xd2511f53u;
        const u32 high1 = __umulhi(counter.z, 0xcd9e8d57u), low1 = counter.z * 0xcd9e8d57u;
        counter = make_uint4(high1 ^ counter.y ^ k0, low1, high0 ^ counter.w ^ k1, low0);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return counter;
}

// log(v) for normal v > 0 within 3 units in the last place, the same bits on every machine: v = 2^k m with m in
// [sqrt(1/2), sqrt(2)), log(m) = 2 artanh(s), s = (m - 1) / (m + 1), by its series.
__device__ __forceinline__ float natural_log(float v) {
    constexpr int least_mantissa = 0x3f3504f3;  // sqrt(1/2)
    const int offset = __float_as_int(v) - least_mantissa;
    const float k = static_cast<float>(offset >> 23);
    const float f = __fsub_rn(__int_as_float((offset & 0x007fffff) + least_mantissa), 1.0f);
    const float s = __fdiv_rn(f, __fadd_rn(f, 2.0f));
    const float w = __fmul_rn(s, s);
    float series = 2.0f / 9;
    series = __fadd_rn(__fmul_rn(series, w), 2.0f / 7);
    series = __fadd_rn(__fmul_rn(series, w), 2.0f / 5);
    series = __fadd_rn(__fmul_rn(series, w), 2.0f / 3);
    const float log_m = __fadd_rn(__fmul_rn(s, 2.0f), __fmul_rn(__fmul_rn(s, w), series));
    // ln(2) = 0.693145751953125 + 1.42860677e-6: k times the first is exact.
    return __fadd_rn(__fmul_rn(k, 0.693145751953125f), __fadd_rn(__fmul_rn(k, 1.42860677e-6f), log_m));
}

// -log(-log(1 - u)) with u = (bits + 1/2) 2^-32. What 1 - u loses by rounding is added again as c / v.
__device__ __forceinline__ float gumbel(u32 bits) {
    const float u = fminf(__fmul_rn(__fadd_rn(static_cast<float>(bits), 0.5f), 2.32830644e-10f), 0.99999994f);
    const float v = __fsub_rn(1.0f, u);
    const float c = __fsub_rn(__fsub_rn(1.0f, v), u);
    return -natural_log(-__fadd_rn(natural_log(v), __fdiv_rn(c, v)));
}
