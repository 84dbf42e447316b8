// Root-mean-square normalisation of rows, alone or after adding to a residual stream, and layer normalisation.
// Specification: rms_norm.py.
//
// A row is held in registers by the blockDim.x threads that share it and is read once. Short rows take one warp each
// (blockDim.y rows per block), longer ones a block each. The order of the sum depends on the row length only.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16 VECTORS_PER_THREAD=1,2
// variants: DTYPE=F32 VECTORS_PER_THREAD=1,2,4
#include "device.cuh"

constexpr int width = vector_size<scalar_t>;

// This thread's vectors of a row are blockDim.x apart, so that neighbours read neighbouring memory.
struct Row {
    float values[VECTORS_PER_THREAD][width];
};
struct Weight {
    uint4 vectors[VECTORS_PER_THREAD];
};

__device__ __forceinline__ int vector_index(int i) { return i * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int row_index() { return blockIdx.x * blockDim.y + threadIdx.y; }
__device__ __forceinline__ i64 row_offset(int dim) { return static_cast<i64>(row_index()) * dim; }
// Rows of tokens that lie apart: each token has `rows_of_token` rows side by side.
__device__ __forceinline__ i64 row_offset(int dim, int rows_of_token, i64 token_stride) {
    return row_index() / rows_of_token * token_stride + row_index() % rows_of_token * dim;
}

__device__ __forceinline__ Weight load_row_weight(const scalar_t* weight, int dim) {
    Weight w;
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; i++)
        if (vector_index(i) < dim / width) w.vectors[i] = load_weight(weight + vector_index(i) * width);
    return w;
}

__device__ __forceinline__ Row load_row(const scalar_t* x, int dim) {
    Row row;
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; i++) {
        const bool inside = vector_index(i) < dim / width;
        unpack<scalar_t>(inside ? load_activation(x + vector_index(i) * width) : make_uint4(0, 0, 0, 0), row.values[i]);
    }
    return row;
}

// row = x + residual, rounded and stored: what the norm sees is the residual stream as it is kept.
__device__ __forceinline__ void add_residual(Row& row, const scalar_t* residual, scalar_t* residual_out, int dim) {
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; i++) {
        if (vector_index(i) >= dim / width) continue;
        float other[width];
        unpack<scalar_t>(load_activation(residual + vector_index(i) * width), other);
#pragma unroll
        for (int j = 0; j < width; j++) row.values[i][j] += other[j];
        const uint4 sum = pack<scalar_t>(row.values[i]);
        store_vector(residual_out + vector_index(i) * width, sum);
        unpack<scalar_t>(sum, row.values[i]);
    }
}

__device__ __forceinline__ float square_sum_of(const Row& row, float* scratch) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; i++)
#pragma unroll
        for (int j = 0; j < width; j++) sum += row.values[i][j] * row.values[i][j];
    return block_sum(sum, scratch);
}

// 1 / sqrt(mean(x^2) + eps) of the whole row. Exact division and square root: once per row they cost nothing.
__device__ __forceinline__ float reciprocal_rms(const Row& row, int dim, float eps, float* scratch) {
    return 1.0f / sqrtf(square_sum_of(row, scratch) / dim + eps);
}

__device__ __forceinline__ void store_normalised(const Row& row, const Weight& w, float scale, float weight_offset,
                                                 bool multiply_before_cast, scalar_t* out, int dim) {
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; i++) {
        if (vector_index(i) >= dim / width) continue;
        float weight[width], y[width];
        unpack<scalar_t>(w.vectors[i], weight);
#pragma unroll
        for (int j = 0; j < width; j++) {
            const float normalised = row.values[i][j] * scale;
            const float factor = multiply_before_cast ? normalised : rounded<scalar_t>(normalised);
            y[j] = factor * (weight[j] + weight_offset);
        }
        store_vector(out + vector_index(i) * width, pack<scalar_t>(y));
    }
}

// out = norm(x) * (weight[dim] + weight_offset) of rows [rows, dim], where the rows of a token lie side by side and
// tokens of x and out lie x_stride and out_stride elements apart; out may be x. total, if it is not null: for each row,
// total_stride apart, the sum of squares over the `total_dim` elements that the row is a part of.
extern "C" __global__ void __launch_bounds__(1024)
rms_norm(const scalar_t* x, const scalar_t* weight, scalar_t* out, const float* total, int rows, int dim,
         int rows_of_token, i64 x_stride, i64 out_stride, i64 total_stride, int total_dim, float eps,
         float weight_offset, int multiply_before_cast) {
    __shared__ float scratch[warp_size];
    pdl_launch_dependents();
    const Weight w = load_row_weight(weight, dim);
    pdl_wait();
    if (row_index() >= rows) return;  // whole warps, and only where a row is one warp
    const Row row = load_row(x + row_offset(dim, rows_of_token, x_stride), dim);
    float scale;
    if (total == nullptr)
        scale = reciprocal_rms(row, dim, eps, scratch);
    else
        scale = 1.0f / sqrtf(load_activation_element(total + row_index() * total_stride) / total_dim + eps);
    store_normalised(row, w, scale, weight_offset, multiply_before_cast,
                     out + row_offset(dim, rows_of_token, out_stride), dim);
}

// sums = the sum of squares of each row; rows lie x_stride elements apart, their sums sums_stride.
extern "C" __global__ void __launch_bounds__(1024)
square_sum(const scalar_t* x, float* sums, int rows, int dim, i64 x_stride, i64 sums_stride) {
    __shared__ float scratch[warp_size];
    pdl_launch_dependents();
    pdl_wait();
    if (row_index() >= rows) return;
    const float sum = square_sum_of(load_row(x + row_index() * x_stride, dim), scratch);
    if (threadIdx.x == 0) sums[row_index() * sums_stride] = sum;
}

// out[rows, dim] = (x - mean) / sqrt(variance + eps) * weight + bias; bias may be null, out may be x.
extern "C" __global__ void __launch_bounds__(1024)
layer_norm(const scalar_t* x, const scalar_t* weight, const scalar_t* bias, scalar_t* out, int rows, int dim,
           float eps) {
    __shared__ float scratch[warp_size];
    pdl_launch_dependents();
    const Weight w = load_row_weight(weight, dim);
    pdl_wait();
    if (row_index() >= rows) return;
    Row row = load_row(x + row_offset(dim), dim);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; i++)
#pragma unroll
        for (int j = 0; j < width; j++) sum += row.values[i][j];
    const float mean = block_sum(sum, scratch) / dim;
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; i++)
#pragma unroll
        for (int j = 0; j < width; j++) row.values[i][j] = vector_index(i) < dim / width ? row.values[i][j] - mean : 0;
    const float scale = reciprocal_rms(row, dim, eps, scratch);
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; i++) {
        if (vector_index(i) >= dim / width) continue;
        float factor[width], addend[width] = {};
        unpack<scalar_t>(w.vectors[i], factor);
        if (bias != nullptr) unpack<scalar_t>(load_weight(bias + vector_index(i) * width), addend);
#pragma unroll
        for (int j = 0; j < width; j++)
            factor[j] = __fadd_rn(__fmul_rn(__fmul_rn(row.values[i][j], scale), factor[j]), addend[j]);
        store_vector(out + row_offset(dim) + vector_index(i) * width, pack<scalar_t>(factor));
    }
}

// residual_out = x + residual; out = norm(residual_out) * (weight + weight_offset). residual_out may be residual or x,
// and out may be x: a thread has read its part of a row before it writes the same part of another array.
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm(const scalar_t* x, const scalar_t* residual, const scalar_t* weight, scalar_t* residual_out,
             scalar_t* out, int rows, int dim, float eps, float weight_offset, int multiply_before_cast) {
    __shared__ float scratch[warp_size];
    pdl_launch_dependents();
    const Weight w = load_row_weight(weight, dim);
    pdl_wait();
    if (row_index() >= rows) return;
    Row row = load_row(x + row_offset(dim), dim);
    add_residual(row, residual + row_offset(dim), residual_out + row_offset(dim), dim);
    const float scale = reciprocal_rms(row, dim, eps, scratch);
    store_normalised(row, w, scale, weight_offset, multiply_before_cast, out + row_offset(dim), dim);
}
