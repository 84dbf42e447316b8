// y[M,N] = x[M,K] W[N,K]^T (+ bias[N]) for few rows of x: W is streamed once, past shared memory. Specification:
// linear.py.
//
// A block owns ROWS rows of W and 8 * M_TILES rows of x, and its warps split K. A warp takes slices of 128 bytes (512
// for float32) of a row in turn with the other warps, so that the block reads W in long runs. Loads go straight to the
// operands of the product: any permutation of k is legal if W and x share it, hence a lane's 16 bytes at k = 8t are
// operands of two tensor core instructions as they are. Shared memory serves the final sum over warps only: an element
// of x is used by one warp of the block, so staging it would save no traffic; what saves some is a larger ROWS.
//
// The order of the sum for one output depends on K and the number of warps: one accumulator per warp over its slices in
// ascending order, then the warps in order. Neither ROWS, M_TILES nor STEPS changes it, nor does the place of the row
// of x among the others. Rows past the ends of W and x repeat the last one and are not stored.
//
// STEPS is how many loads of a row are in flight per lane, all started before the activations are waited for.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16 M_TILES=1 ROWS=8 STEPS=8
// variants: DTYPE=BF16,F16 M_TILES=1 ROWS=16 STEPS=4,8
// variants: DTYPE=BF16,F16 M_TILES=2 ROWS=16,32 STEPS=4
// variants: DTYPE=BF16,F16 M_TILES=4 ROWS=16 STEPS=4
// variants: DTYPE=BF16,F16 M_TILES=4 ROWS=32 STEPS=2
// variants: DTYPE=BF16,F16 M_TILES=8 ROWS=16,48 STEPS=2
// variants: DTYPE=BF16,F16 M_TILES=8 ROWS=32 STEPS=4
// variants: DTYPE=F32 M_TILES=1 ROWS=4 STEPS=2
#include "device.cuh"

constexpr int columns = 8 * M_TILES;  // rows of x, which are the columns of the product on the tensor cores

// A warp load: `lanes_along_k` neighbouring lanes take neighbouring vectors of one row, the next ones another row.
constexpr bool tensor_cores = !same_type<scalar_t, float>;
constexpr int width = vector_size<scalar_t>;
constexpr int lanes_along_k = tensor_cores ? 4 : warp_size;
constexpr int rows_per_load = warp_size / lanes_along_k;
constexpr int step_length = lanes_along_k * width;  // in k
constexpr int steps_per_slice = tensor_cores ? 2 : 1;
constexpr int slice_length = steps_per_slice * step_length;

// Steps of x in flight. Its way is short, but should hide behind products of other steps where registers allow it.
constexpr int x_steps = !tensor_cores ? 1 : M_TILES == 1 ? 4 : M_TILES == 8 && ROWS != 32 ? 1 : 2;
static_assert(STEPS % steps_per_slice == 0 && STEPS % x_steps == 0 && ROWS % rows_per_load == 0, "whole rings");

// Registers for three, two or one block of 8 warps per multiprocessor, by what the weights in flight occupy; those for
// two serve one block of 16 warps, too.
constexpr int max_threads = 256 * (M_TILES == 1 ? (ROWS * STEPS == 64 ? 3 : 2) : ROWS * STEPS <= 64 ? 2 : 1);

// What one load of each of `rows` rows brings.
template <int rows> struct Step {
    uint4 vectors[rows / rows_per_load];
};
typedef Step<ROWS> WeightStep;
typedef Step<columns> ActivationStep;

// ---- where things are

__device__ __forceinline__ int warps() { return blockDim.x / warp_size; }

// From one slice of a warp to its next.
__device__ __forceinline__ int slice_distance() { return warps() * slice_length; }

// This lane's first position in K, and how far step `i` of its warp is from there.
__device__ __forceinline__ int first_in_k() { return warp_id() * slice_length + lane_id() % lanes_along_k * width; }
__device__ __forceinline__ int step_offset(int i) {
    return i / steps_per_slice * slice_distance() + i % steps_per_slice * step_length;
}

// How many steps of this warp begin inside K.
__device__ __forceinline__ int steps_of_warp(int k) {
    const int rest = k % slice_distance() - warp_id() * slice_length;  // of its last slice; beyond K if negative
    const int last_steps = min(max((rest + step_length - 1) / step_length, 0), steps_per_slice);
    return k / slice_distance() * steps_per_slice + last_steps;
}

// Offsets of the rows that this lane loads; 32 bits suffice within a block.
template <int rows> struct Offsets {
    int of[rows / rows_per_load];

    __device__ __forceinline__ Offsets(int rows_left, int stride) {
#pragma unroll
        for (int i = 0; i < rows / rows_per_load; i++)
            of[i] = min(i * rows_per_load + lane_id() / lanes_along_k, rows_left - 1) * stride;
    }
};

// ---- loads: zeros beyond K

__device__ __forceinline__ WeightStep load_weights(const scalar_t* weight, const Offsets<ROWS>& rows, int at, int k) {
    WeightStep w;
#pragma unroll
    for (int i = 0; i < ROWS / rows_per_load; i++)
        w.vectors[i] = load_weight_if(at < k, weight + (rows.of[i] + at));
    return w;
}

__device__ __forceinline__ ActivationStep load_x(const scalar_t* x, const Offsets<columns>& rows, int at, int k) {
    ActivationStep v;
#pragma unroll
    for (int i = 0; i < columns / rows_per_load; i++)
        v.vectors[i] = load_activation_if(at < k, x + (rows.of[i] + at));
    return v;
}

// ---- sums of one warp, and the place of each in its list of ROWS * columns results

// bf16 and f16: fragments of C[16x8] tiles. A tile of 8 rows leaves the lower half of C unused.
template <class T> struct Sums {
    static constexpr int row_tiles = (ROWS + 15) / 16;
    static constexpr int parts = ROWS < 16 ? 2 : 4;  // elements of C per lane and tile that are results
    float c[row_tiles][M_TILES][4] = {};

    __device__ __forceinline__ void add(const WeightStep& w, const ActivationStep& x) {
        const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < row_tiles; i++) {
            const uint4 a = w.vectors[2 * i], b = ROWS < 16 ? none : w.vectors[ROWS < 16 ? 0 : 2 * i + 1];
#pragma unroll
            for (int j = 0; j < M_TILES; j++) {
                mma_m16n8k16<T>(c[i][j], a.x, b.x, a.y, b.y, x.vectors[j].x, x.vectors[j].y);
                mma_m16n8k16<T>(c[i][j], a.z, b.z, a.w, b.w, x.vectors[j].z, x.vectors[j].w);
            }
        }
    }
    __device__ __forceinline__ void store(float* list) const {
#pragma unroll
        for (int i = 0; i < row_tiles; i++)
#pragma unroll
            for (int j = 0; j < M_TILES; j++)
#pragma unroll
                for (int part = 0; part < parts; part++)
                    list[((i * M_TILES + j) * parts + part) * warp_size + lane_id()] = c[i][j][part];
    }
    static __device__ __forceinline__ int row(int place) {
        const int tile = place / (parts * warp_size), part = place / warp_size % parts;
        return tile / M_TILES * 16 + part / 2 * 8 + place % warp_size / 4;
    }
    static __device__ __forceinline__ int column(int place) {
        const int tile = place / (parts * warp_size), part = place / warp_size % parts;
        return tile % M_TILES * 8 + place % 4 * 2 + part % 2;
    }
};

// float32: each lane sums its own k, in full precision.
template <> struct Sums<float> {
    float c[ROWS][columns] = {};

    __device__ __forceinline__ void add(const WeightStep& w, const ActivationStep& x) {
        float a[ROWS][vector_size<float>];
#pragma unroll
        for (int i = 0; i < ROWS; i++) unpack<float>(w.vectors[i % (ROWS / rows_per_load)], a[i]);
#pragma unroll
        for (int j = 0; j < columns; j++) {
            float b[vector_size<float>];
            unpack<float>(x.vectors[j % (columns / rows_per_load)], b);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int e = 0; e < vector_size<float>; e++) c[i][j] = fmaf(a[i][e], b[e], c[i][j]);
        }
    }
    __device__ __forceinline__ void store(float* list) const {
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < columns; j++) {
                const float sum = warp_sum(c[i][j]);
                if (lane_id() == 0) list[i * columns + j] = sum;
            }
    }
    static __device__ __forceinline__ int row(int place) { return place / columns; }
    static __device__ __forceinline__ int column(int place) { return place % columns; }
};

// The sums of this warp over its part of K. Returns after pdl_wait.
__device__ __forceinline__ Sums<scalar_t> multiply(const scalar_t* weight, const Offsets<ROWS>& weight_rows,
                                                   const scalar_t* x, const Offsets<columns>& x_rows, int k) {
    WeightStep w[STEPS];
    ActivationStep v[x_steps];
    Sums<scalar_t> sums;
    int at = first_in_k();
#pragma unroll
    for (int i = 0; i < STEPS; i++) w[i] = load_weights(weight, weight_rows, at + step_offset(i), k);
    pdl_wait();
#pragma unroll
    for (int i = 0; i < x_steps; i++) v[i] = load_x(x, x_rows, at + step_offset(i), k);
    const int steps = steps_of_warp(k);
#pragma unroll 1
    for (int first = 0; first < steps; first += STEPS, at += step_offset(STEPS)) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (first + i >= steps) break;
            sums.add(w[i], v[i % x_steps]);
            v[i % x_steps] = load_x(x, x_rows, at + step_offset(i + x_steps), k);
            w[i] = load_weights(weight, weight_rows, at + step_offset(i + STEPS), k);
        }
    }
    return sums;
}

// x: m rows of k elements, x_stride apart; weight [n, k]; bias [n] or null; y: m rows of n elements, y_stride apart,
// float if `float_out`. Blocks go through all tiles of x for one tile of W before the next. Dynamic shared memory:
// a float for each of the block's results and each warp.
extern "C" __global__ void __launch_bounds__(max_threads)
skinny_gemm(const scalar_t* x, const scalar_t* weight, const scalar_t* bias, void* y, int m, int n, int k,
            int x_stride, i64 y_stride, int float_out) {
    constexpr int results = ROWS * columns;
    __shared__ float bias_of_row[ROWS];
    float* lists = dynamic_shared<float>();
    const int x_tiles = (m + columns - 1) / columns;
    const int first_row = blockIdx.x / x_tiles * ROWS, first_column = blockIdx.x % x_tiles * columns;
    const int rows = min(n - first_row, ROWS);
    float own_bias = 0.0f;
    if (bias && threadIdx.x < rows) own_bias = to_float(bias[first_row + threadIdx.x]);

    const Sums<scalar_t> sums = multiply(
        weight + static_cast<i64>(first_row) * k, Offsets<ROWS>(rows, k),
        x + static_cast<i64>(first_column) * x_stride, Offsets<columns>(m - first_column, x_stride), k);
    pdl_launch_dependents();

    sums.store(lists + warp_id() * results);
    if (threadIdx.x < ROWS) bias_of_row[threadIdx.x] = own_bias;
    __syncthreads();
    for (int place = threadIdx.x; place < results; place += blockDim.x) {
        const int row = Sums<scalar_t>::row(place), column = first_column + Sums<scalar_t>::column(place);
        float sum = lists[place];
        for (int warp = 1; warp < warps(); warp++) sum += lists[warp * results + place];
        if (row >= rows || column >= m) continue;
        if (bias) sum += bias_of_row[row];
        const i64 at = column * y_stride + first_row + row;
        if (float_out) static_cast<float*>(y)[at] = sum;
        else static_cast<scalar_t*>(y)[at] = from_float<scalar_t>(sum);
    }
}
