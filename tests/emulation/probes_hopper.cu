// Small kernels for the parts of hopper.cuh, to compare it with NumPy on the CPU and on a GPU.
//
// archs: sm_90a
// variants: DTYPE=BF16,F16
#include "../../cutp/ops/device.cuh"
#include "../../cutp/ops/hopper.cuh"

constexpr u32 row_bytes = 128;  // 64 elements
constexpr int panel_columns = 64;

// Copies `rows` rows of 128 bytes, as they lie in shared memory, to `out`.
__device__ __forceinline__ void dump(u32 address, uint4* out, int rows) {
    for (int i = threadIdx.x; i < 8 * rows; i += blockDim.x) store_vector(out + i, load_shared(address + 16 * i));
}

// ---- boxes: out is one as it arrives, of an array of 2 to 5 axes, from the coordinates c0 to c4

extern "C" __global__ void box(const __grid_constant__ TensorMap map, uint4* out, int axes, int rows, int c0, int c1,
                               int c2, int c3, int c4) {
    const u32 barrier = shared_address(dynamic_shared()), data = barrier + 1024;
    if (threadIdx.x == 0) {
        tensor_map_prefetch(map);
        barrier_init(barrier, 1);
        barrier_init_fence();
    }
    __syncthreads();
    pdl_wait();
    if (threadIdx.x == 0) {
        async_global_fence();
        barrier_arrive_expect(barrier, rows * row_bytes);
        if (axes == 2 && c1 % 2) tensor_copy_streamed(data, map, barrier, c0, c1);
        else if (axes == 2) tensor_copy(data, map, barrier, c0, c1);
        if (axes == 3 && c1 % 2) tensor_copy_streamed(data, map, barrier, c0, c1, c2);
        else if (axes == 3) tensor_copy(data, map, barrier, c0, c1, c2);
        if (axes == 4) tensor_copy(data, map, barrier, c0, c1, c2, c3);
        if (axes == 5) tensor_copy(data, map, barrier, c0, c1, c2, c3, c4);
    }
    barrier_wait(barrier, 0);
    dump(data, out, rows);
}

// ---- a ring: out[rows][64] = X[rows][K] W[64][K]^T, by one producer and two consumers of 64 rows each

constexpr int stages = 2, ring_n = 64;
constexpr u32 w_bytes = ring_n * row_bytes, x_bytes = 64 * row_bytes, stage_bytes = w_bytes + 2 * x_bytes;

struct Ring {
    u32 data, full, empty;

    __device__ explicit Ring(u32 begin) : data(begin), full(begin + stages * stage_bytes), empty(full + 8 * stages) {}
    __device__ u32 stage(int i) const { return data + i % stages * stage_bytes; }
    __device__ u32 filled(int i) const { return full + i % stages * 8; }
    __device__ u32 emptied(int i) const { return empty + i % stages * 8; }
    static __device__ u32 parity(int i) { return i / stages % 2; }
};

__device__ void produce(const Ring& ring, const TensorMap& x, const TensorMap& w, int tiles, int steps) {
    int i = 0;
    bool waited = false;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        for (int step = 0; step < steps; step++, i++) {
            barrier_wait(ring.emptied(i), Ring::parity(i) ^ 1);
            barrier_arrive_expect(ring.filled(i), stage_bytes);
            tensor_copy_streamed(ring.stage(i), w, ring.filled(i), step * panel_columns, 0);
            if (!waited) {
                pdl_wait();
                async_global_fence();
                waited = true;
            }
            tensor_copy(ring.stage(i) + w_bytes, x, ring.filled(i), step * panel_columns, 128 * tile);
        }
    }
}

__device__ void consume(const Ring& ring, scalar_t* out, int consumer, int rows, int tiles, int steps) {
    const int t = threadIdx.x % 128;
    float d[ring_n / 2];
    int i = 0;
    if (consumer == 1) named_barrier_arrive(1, 256);  // the first turn is consumer 0's
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        for (int step = 0; step < steps; step++, i++) {
            const u64 w = matrix_descriptor(ring.stage(i), 16, 1024);
            const u64 x = matrix_descriptor(ring.stage(i) + w_bytes + consumer * x_bytes, 16, 1024);
            barrier_wait(ring.filled(i), Ring::parity(i));
            named_barrier_sync(1 + consumer, 256);
            keep_registers(d);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
                wgmma_shared<scalar_t, ring_n, false>(d, descriptor_at(x, 32 * k), descriptor_at(w, 32 * k),
                                                      step > 0 || k > 0);
            wgmma_commit();
            named_barrier_arrive(2 - consumer, 256);
            // The step before is finished: its stage can be filled again.
            wgmma_wait<1>();
            if (step > 0 && t == 0) barrier_arrive(ring.emptied(i - 1));
        }
        wgmma_wait<0>();
        keep_registers(d);
        if (t == 0) barrier_arrive(ring.emptied(i - 1));
        const int row = 128 * tile + 64 * consumer + t / 32 * 16 + t % 32 / 4;
#pragma unroll
        for (int j = 0; j < ring_n / 2; j++) {
            const int r = row + j / 2 % 2 * 8;
            if (r < rows) out[r * ring_n + j / 4 * 8 + t % 4 * 2 + j % 2] = from_float<scalar_t>(d[j]);
        }
    }
    if (consumer == 0) named_barrier_sync(1, 256);  // takes the other's last turn
}

extern "C" __global__ void __launch_bounds__(384, 1)
    ring(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, scalar_t* out, int rows, int tiles,
         int steps) {
    const Ring ring(shared_address(dynamic_shared()));
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            barrier_init(ring.filled(i), 1);
            barrier_init(ring.emptied(i), 2);
        }
        barrier_init_fence();
    }
    __syncthreads();
    pdl_launch_dependents();
    const int role = threadIdx.x / 128;
    if (role == 2) {
        registers_decrease<40>();
        if (threadIdx.x == 256) produce(ring, x, w, tiles, steps);
    } else {
        registers_increase<232>();
        consume(ring, out, role, rows, tiles, steps);
    }
}

// ---- rows of shared memory written by threads, as an operand: out[64][8] = A[64][16] B[8][16]^T

extern "C" __global__ void __launch_bounds__(128, 1)
    written_operands(const uint4* a, const uint4* b, float* out) {
    const u32 rows_a = shared_address(dynamic_shared()), rows_b = rows_a + 64 * row_bytes;
    const int t = threadIdx.x, row = t / 2, half = t % 2;
    store_shared(rows_a + row * row_bytes + (half ^ row % 8) * 16, load_activation(a + t));
    if (row < 8) store_shared(rows_b + row * row_bytes + (half ^ row % 8) * 16, load_activation(b + t));
    async_shared_fence();
    __syncthreads();
    float d[4];
    keep_registers(d);
    wgmma_fence();
    const u64 operand_a = matrix_descriptor(rows_a, 16, 1024), operand_b = matrix_descriptor(rows_b, 16, 1024);
    wgmma_shared<scalar_t, 8, false>(d, operand_a, operand_b, false);
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(d);
    for (int i = 0; i < 4; i++) out[(t / 32 * 16 + t % 32 / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = d[i];
}
