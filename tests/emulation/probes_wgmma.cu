// Products of one warpgroup, of each shape, to compare hopper.cuh with NumPy on the CPU and on a GPU.
//
// archs: sm_90a
// variants: DTYPE=BF16,F16
#include "../../cutp/ops/device.cuh"
#include "../../cutp/ops/hopper.cuh"

constexpr u32 row_bytes = 128;  // 64 elements
constexpr int panel_columns = 64;

// out[64][N] = initial + A[64][K] B. B[K][N] is given as rows along K, [N][K], or as rows along N, [K][N]. A comes from
// shared memory or registers.
template <int N, bool from_registers, bool transposed>
__device__ void product(const TensorMap& map_a, const TensorMap& map_b, float* out, int k_panels, float initial) {
    const u32 barrier = shared_address(dynamic_shared()), a = barrier + 1024;
    const u32 a_panel = 64 * row_bytes, b = a + k_panels * a_panel;
    constexpr int n_panels = (N + panel_columns - 1) / panel_columns;
    const u32 k = k_panels * panel_columns, b_panel = (transposed ? k : N) * row_bytes;
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
        barrier_arrive_expect(barrier, k_panels * a_panel + (transposed ? n_panels : k_panels) * b_panel);
        for (int p = 0; p < k_panels; p++) {
            tensor_copy(a + p * a_panel, map_a, barrier, p * panel_columns, 0);
            if (transposed) {  // boxes of 64 rows
                for (int i = 0; i < n_panels; i++)
                    tensor_copy(b + i * b_panel + p * 64 * row_bytes, map_b, barrier, i * panel_columns, p * 64);
            } else {
                tensor_copy(b + p * b_panel, map_b, barrier, p * panel_columns, 0);
            }
        }
    }
    __syncthreads();
    barrier_wait(barrier, 0);

    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, first = threadIdx.x / 32 * 16 + g;
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[i] = initial;
    const u64 a_start = matrix_descriptor(a, 16, 1024);
    const u64 b_start = matrix_descriptor(b, b_panel, 1024);
    keep_registers(d);
    wgmma_fence();
#pragma unroll 1
    for (int step = 0; step < static_cast<int>(k) / 16; step++) {
        const u32 panel = step / 4, inside = step % 4 * 32;
        const u64 b_here = descriptor_at(b_start, transposed ? step * 16 * row_bytes : panel * b_panel + inside);
        const bool accumulate = step > 0 || initial != 0.0f;
        if constexpr (from_registers) {
            u32 fragment[4];
            const u32 lanes = a + panel * a_panel;
            ldmatrix_x4(fragment, lanes + (first - g + threadIdx.x % 16) * row_bytes +
                                      ((inside + threadIdx.x % 32 / 16 * 16) ^ (threadIdx.x % 8 * 16)));
            keep_registers(fragment);
            wgmma_fence();
            wgmma_registers<scalar_t, N, transposed>(d, fragment, b_here, accumulate);
            wgmma_commit();
            wgmma_wait<0>();
            keep_registers(fragment);
        } else {
            const u64 a_here = descriptor_at(a_start, panel * a_panel + inside);
            wgmma_shared<scalar_t, N, transposed>(d, a_here, b_here, accumulate);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(d);
#pragma unroll
    for (int i = 0; i < N / 2; i++) out[(first + i / 2 % 2 * 8) * N + i / 4 * 8 + 2 * q + i % 2] = d[i];
}

template <int N>
__device__ void products(const TensorMap& map_a, const TensorMap& map_b, float* out, int k_panels, float initial,
                         int from_registers, int transposed) {
    if (from_registers) {
        if (transposed) product<N, true, true>(map_a, map_b, out, k_panels, initial);
        else product<N, true, false>(map_a, map_b, out, k_panels, initial);
    } else {
        if (transposed) product<N, false, true>(map_a, map_b, out, k_panels, initial);
        else product<N, false, false>(map_a, map_b, out, k_panels, initial);
    }
}

#define PARAMETERS                                                                                            \
    const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, float *out, int k_panels, \
        float initial, int from_registers, int transposed
#define ARGUMENTS map_a, map_b, out, k_panels, initial, from_registers, transposed
extern "C" __global__ void __launch_bounds__(128, 1) products_8(PARAMETERS) { products<8>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128, 1) products_16(PARAMETERS) { products<16>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128, 1) products_32(PARAMETERS) { products<32>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128, 1) products_64(PARAMETERS) { products<64>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128, 1) products_80(PARAMETERS) { products<80>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128, 1) products_96(PARAMETERS) { products<96>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128, 1) products_128(PARAMETERS) { products<128>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128, 1) products_176(PARAMETERS) { products<176>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128, 1) products_256(PARAMETERS) { products<256>(ARGUMENTS); }
