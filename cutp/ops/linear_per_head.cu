// y[t, h] = x[t, h] W[h]^T for every token t and head h: a small product for each head. Specification: linear.py.
//
// The weights of a head are [n, k], or where they are TRANSPOSED [k, n]. Tensor cores multiply 16-bit elements, 32 tokens
// and 32 columns a warp. Operands go straight from memory to registers, 16 bytes a time: in which order the channels of K
// meet does not matter, as long as it is the same for x and W. float32 is multiplied as it is.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32 TRANSPOSED=0,1
#include "device.cuh"

constexpr int width = vector_size<scalar_t>;
constexpr bool transposed = TRANSPOSED;
constexpr int threads = 128, warps = threads / warp_size;
constexpr int row_tiles = 2, column_tiles = 4;  // of a warp, 16 rows and 8 columns each
constexpr int rows_of_warp = 16 * row_tiles, columns_of_warp = 8 * column_tiles;
constexpr int step = 32;  // channels of K a time
constexpr int rows_of_thread = 8;  // with float32, where a thread has one column

struct Problem {
    const scalar_t *x, *weight;  // of one head
    scalar_t* y;
    int tokens, n, k;
    i64 x_stride, weight_stride, y_stride;  // from a token, or a row of the weight, to the next
};

__device__ __forceinline__ u32 word(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Lane 4g + t has of each tile of x the rows g and g + 8, and of 32 channels those from 8t on. Step s of the two that 32
// channels are takes of them 4s .. 4s + 3: the first two are channels 2t of the instruction, the others 2t + 8.
__device__ __forceinline__ void multiply(const Problem& p, int first_row, int first_column) {
    if constexpr (!same_type<scalar_t, float>) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        float sums[row_tiles][column_tiles][4] = {};
        for (int at = 0; at < p.k; at += step) {
            uint4 x[row_tiles][2];
#pragma unroll
            for (int i = 0; i < row_tiles; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = first_row + 16 * i + 8 * half + g;
                    x[i][half] = load_activation_if(row < p.tokens && at + 8 * t < p.k,
                                                    p.x + row * p.x_stride + at + 8 * t);
                }
            u32 weight[column_tiles][4];  // the two registers of both steps
            if constexpr (!transposed) {
#pragma unroll
                for (int j = 0; j < column_tiles; j++) {
                    const int column = first_column + 8 * j + g;
                    const uint4 v = load_weight_if(column < p.n && at + 8 * t < p.k,
                                                   p.weight + column * p.weight_stride + at + 8 * t);
#pragma unroll
                    for (int i = 0; i < 4; i++) weight[j][i] = word(v, i);
                }
            } else {
                // Row g of an 8x8 matrix is that channel of K which is channel g of the instruction. Word j of the
                // vectors makes a tile of the columns 8c + 2j and 8c + 2j + 1, c = 0 .. 3.
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int channel = at + 8 * (g / 2) + 2 * i + g % 2, column = first_column + 8 * t;
                    const uint4 v = load_weight_if(column < p.n && channel < p.k,
                                                   p.weight + channel * p.weight_stride + column);
#pragma unroll
                    for (int j = 0; j < column_tiles; j++) weight[j][i] = transpose_8x8(word(v, j));
                }
            }
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int i = 0; i < row_tiles; i++)
#pragma unroll
                    for (int j = 0; j < column_tiles; j++)
                        mma_m16n8k16<scalar_t>(sums[i][j], word(x[i][0], 2 * s), word(x[i][1], 2 * s),
                                               word(x[i][0], 2 * s + 1), word(x[i][1], 2 * s + 1), weight[j][2 * s],
                                               weight[j][2 * s + 1]);
        }
#pragma unroll
        for (int i = 0; i < row_tiles; i++)
#pragma unroll
            for (int j = 0; j < column_tiles; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = first_row + 16 * i + 8 * (e / 2) + g;
                    const int column = first_column + (transposed ? 8 * t + 2 * j : 8 * j + 2 * t) + e % 2;
                    if (row < p.tokens && column < p.n)
                        p.y[row * p.y_stride + column] = from_float<scalar_t>(sums[i][j][e]);
                }
    }
}

__device__ __forceinline__ void multiply_float(const Problem& p, int first_row, int column) {
    if constexpr (same_type<scalar_t, float>) {
        if (column >= p.n) return;
        float sums[rows_of_thread] = {};
        for (int at = 0; at < p.k; at += width) {
            float weight[width];
            if constexpr (!transposed) {
                unpack<scalar_t>(load_weight(p.weight + column * p.weight_stride + at), weight);
            } else {
#pragma unroll
                for (int i = 0; i < width; i++)
                    weight[i] = to_float(load_activation_element(p.weight + (at + i) * p.weight_stride + column));
            }
#pragma unroll
            for (int r = 0; r < rows_of_thread; r++) {
                const int row = first_row + r;
                float x[width];
                unpack<scalar_t>(load_activation_if(row < p.tokens, p.x + row * p.x_stride + at), x);
#pragma unroll
                for (int i = 0; i < width; i++) sums[r] += x[i] * weight[i];
            }
        }
#pragma unroll
        for (int r = 0; r < rows_of_thread; r++)
            if (first_row + r < p.tokens) p.y[(first_row + r) * p.y_stride + column] = from_float<scalar_t>(sums[r]);
    }
}

// Tokens of x and y, rows of the weight, and heads of all three lie their strides apart. Grid: tiles of columns, of
// rows, heads.
extern "C" __global__ void __launch_bounds__(threads)
linear_per_head(const scalar_t* x, const scalar_t* weight, scalar_t* y, int tokens, int n, int k, i64 x_stride,
                i64 x_head_stride, i64 weight_stride, i64 weight_head_stride, i64 y_stride, i64 y_head_stride) {
    const i64 head = blockIdx.z;
    const Problem p = {x + head * x_head_stride, weight + head * weight_head_stride, y + head * y_head_stride,
                       tokens, n, k, x_stride, weight_stride, y_stride};
    pdl_wait();
    pdl_launch_dependents();
    if constexpr (same_type<scalar_t, float>)
        multiply_float(p, blockIdx.y * rows_of_thread, blockIdx.x * threads + threadIdx.x);
    else
        multiply(p, blockIdx.y * rows_of_warp, (blockIdx.x * warps + warp_id()) * columns_of_warp);
}
