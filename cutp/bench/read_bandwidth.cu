// Reads an array once and keeps nothing: the limit that memory-bound kernels are held against.
//
// archs: sm_80 sm_90a sm_100
#include "../ops/device.cuh"

constexpr int loads_in_flight = 8;

// data: `vectors` times 16 bytes. out is written only if the sum has one particular value: the loads are not removed.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* data, u32* out, i64 vectors) {
    const i64 threads = static_cast<i64>(gridDim.x) * blockDim.x;
    u32 sum = 0;
    pdl_wait();
    for (i64 first = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; first < vectors;
         first += loads_in_flight * threads) {
        uint4 v[loads_in_flight];
#pragma unroll
        for (int i = 0; i < loads_in_flight; i++)
            v[i] = first + i * threads < vectors ? load_weight(data + first + i * threads) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < loads_in_flight; i++) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    if (sum == 0x9e3779b9) *out = sum;
}
