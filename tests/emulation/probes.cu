// One small kernel for each part of device.cuh, to compare it with NumPy on the CPU and on a GPU.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16
#include "../../cutp/ops/device.cuh"

// out[0..3][thread]: shuffle_xor, shuffle_down, shuffle and ballot of values[thread].
extern "C" __global__ void shuffles(const u32* values, u32* out, int mask, int delta, int source) {
    const u32 v = values[threadIdx.x];
    u32* mine = out + threadIdx.x;
    mine[0] = shuffle_xor(v, mask);
    mine[blockDim.x] = shuffle_down(v, delta);
    mine[2 * blockDim.x] = shuffle(v, source);
    mine[3 * blockDim.x] = ballot(v & 1);
}

extern "C" __global__ void shuffle_doubles(const double* values, double* out, int mask) {
    out[threadIdx.x] = shuffle_xor(values[threadIdx.x], mask);
}

// Two reductions in a row share their scratch.
extern "C" __global__ void reductions(const float* values, float* sums, float* maxima) {
    __shared__ float scratch[32];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    sums[i] = block_sum(values[i], scratch);
    maxima[i] = block_max(values[i], scratch);
}

extern "C" __global__ void to_floats(const scalar_t* values, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = to_float(values[i]);
}

// The same rounding four ways: one value, a pair (low and high half), eight values.
extern "C" __global__ void from_floats(const float* values, scalar_t* single, scalar_t* low, scalar_t* high,
                                       scalar_t* vector) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    single[i] = from_float<scalar_t>(values[i]);
    low[i].bits = static_cast<u16>(pack2<scalar_t>(values[i], 0.0f));
    high[i].bits = static_cast<u16>(pack2<scalar_t>(0.0f, values[i]) >> 16);
    if (i % 8 == 0) {
        float eight[8];
        for (int j = 0; j < 8; j++) eight[j] = values[i + j];
        store_vector(vector + i, pack<scalar_t>(eight));
    }
}

// out[thread] = the vector of each of the four kinds of load, one after the other through shared memory.
extern "C" __global__ void vector_loads(const void* weights, const void* activations, const u16* b2, const float* b4,
                                        const u64* b8, uint4* out) {
    __shared__ uint4 staged[32];
    const int lane = threadIdx.x;
    const uint4 w = load_weight(static_cast<const uint4*>(weights) + lane);
    pdl_wait();
    const uint4 a = load_activation(static_cast<const uint4*>(activations) + lane);
    const u64 eight = load_activation_element(b8 + lane);
    const uint4 elements = make_uint4(load_activation_element(b2 + lane),
                                      __float_as_uint(load_activation_element(b4 + lane)),
                                      static_cast<u32>(eight), static_cast<u32>(eight >> 32));
    store_shared(shared_address(&staged[lane]), make_uint4(w.x + a.x, w.y + a.y, w.z + a.z, w.w + a.w));
    __syncwarp();
    store_vector(out + lane, load_shared(shared_address(&staged[31 - lane])));
    store_vector(out + 32 + lane, elements);
    pdl_launch_dependents();
}

// One warp: out[0] = A B^T and out[1] = A B for A [16][16] and B [16][16], through shared memory and ldmatrix.
extern "C" __global__ void matrix_products(const scalar_t* a, const scalar_t* b, float* out) {
    constexpr int stride = 16 + 8;  // elements of a padded row
    scalar_t* sa = dynamic_shared<scalar_t>();
    scalar_t* sb = sa + 16 * stride;
    const int lane = threadIdx.x;
    const int row = lane / 2, half = lane % 2 * 8;
    store_shared(shared_address(sa + row * stride + half), load_activation(a + row * 16 + half));
    store_shared(shared_address(sb + row * stride + half), load_activation(b + row * 16 + half));
    __syncwarp();
    u32 fa[4], fb[4];
    ldmatrix_x4(fa, shared_address(sa + lane % 16 * stride + lane / 16 * 8));
    for (int transposed = 0; transposed < 2; transposed++) {
        // fb[0], fb[1]: the two k halves of the first 8 columns; fb[2], fb[3]: of the last 8.
        if (transposed) ldmatrix_x4_trans(fb, shared_address(sb + lane % 16 * stride + lane / 16 * 8));
        else ldmatrix_x4(fb, shared_address(sb + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8));
        for (int n = 0; n < 2; n++) {
            float c[4] = {1.0f, 2.0f, 3.0f, 4.0f};
            mma_m16n8k16<scalar_t>(c, fa[0], fa[1], fa[2], fa[3], fb[2 * n], fb[2 * n + 1]);
            for (int i = 0; i < 4; i++) {
                const int r = lane / 4 + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
                out[transposed * 256 + r * 16 + column] = c[i] - (i + 1.0f);
            }
        }
    }
}

// Rows of one vector per thread through two buffers of shared memory; rows from `valid_rows` on arrive as zeros.
extern "C" __global__ void copy_rows(const uint4* in, uint4* out, int rows, int valid_rows) {
    uint4* buffers = dynamic_shared<uint4>();
    const int t = threadIdx.x, n = blockDim.x;
    for (int r = 0; r < rows + 1; r++) {
        if (r < rows) {
            const int source = r < valid_rows ? r * n + t : 0;
            cp_async_16(shared_address(buffers + r % 2 * n + t), in + source, r < valid_rows);
        }
        cp_async_commit();
        if (r == 0) continue;
        cp_async_wait<1>();
        __syncthreads();
        store_vector(out + (r - 1) * n + t, load_shared(shared_address(buffers + (r - 1) % 2 * n + n - 1 - t)));
        __syncthreads();
    }
}

// A histogram by shared atomics, added to a global one; the block that arrives last sums it up.
extern "C" __global__ void histogram(const u32* values, u64* bins, u32* counter, u64* total, u64* largest) {
    __shared__ u32 local[32];
    __shared__ u32 ticket;
    if (threadIdx.x < 32) local[threadIdx.x] = 0;
    __syncthreads();
    const u32 v = values[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(&local[v % 32], 1u);
    atomicMax(largest, static_cast<u64>(v) << 20);
    __syncthreads();
    if (threadIdx.x < 32) atomicAdd(&bins[threadIdx.x], static_cast<u64>(local[threadIdx.x]) << 32);
    __syncthreads();
    if (threadIdx.x == 0) ticket = atomic_add_acq_rel(counter, 1);
    __syncthreads();
    if (ticket != gridDim.x - 1 || threadIdx.x != 0) return;
    u64 sum = 0;
    for (int i = 0; i < 32; i++) sum += load_activation_element(bins + i);
    *total = sum;
}

extern "C" __global__ void approximations(const float* x, float* exp2s, float* rsqrts, float* tanhs) {
    const int i = threadIdx.x;
    exp2s[i] = exp2_approx(x[i]);
    rsqrts[i] = rsqrt_approx(x[i] * x[i] + 0.5f);
    tanhs[i] = tanh_approx(x[i]);
}

// The place of each thread in grid and block, and a clock that does not run backwards.
extern "C" __global__ void places(u32* out, u64* times) {
    const u32 block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const u32 thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const u32 i = block * blockDim.x * blockDim.y * blockDim.z + thread;
    out[i] = threadIdx.x + 100 * threadIdx.y + 10000 * blockIdx.x + 1000000 * blockIdx.y;
    times[2 * i] = global_timer();
    times[2 * i + 1] = global_timer();
}
