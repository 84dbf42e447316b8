// y[i] = x[tokens[i]] W[e]^T (+ bias[e]) for the rows i of expert e, offsets[e] <= i < offsets[e + 1].
// Specification: moe.grouped_linear.
//
// A block computes ROWS rows of one expert for COLUMNS rows of its W; it finds out on the device which, so that a grid
// for as many tiles as there can be serves every way in which tokens choose experts: blocks without a tile return. With
// few rows an expert the kernel is a stream of W and keeps many small stages in flight; with many it is bound by the
// tensor cores, and a wide tile serves each fragment often. All copies to shared memory are asynchronous, 128 bytes of
// each row a stage, in a ring of STAGES.
//
// The sum for one element has one accumulator and takes K in ascending order, the same whatever the tile, the place of
// the row in it and the other rows: a row's result has the same bits in every batch. Any permutation of k is legal if x
// and W share it: a lane's 16 bytes are operands of two tensor core instructions as they are.
//
// bf16 and f16 run on tensor cores; float keeps all its bits by plain multiply-adds.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16 ROWS=16 COLUMNS=32 STAGES=8
// variants: DTYPE=BF16,F16 ROWS=16 COLUMNS=64 STAGES=6
// variants: DTYPE=BF16,F16 ROWS=64,128 COLUMNS=128 STAGES=3
// variants: DTYPE=F32 ROWS=32 COLUMNS=64 STAGES=4
#include "device.cuh"

constexpr int threads = 128;
constexpr int blocks_per_sm = ROWS == 128 ? 2 : 3;
constexpr int width = vector_size<scalar_t>;

// A line is what a stage has of one row of x or W.
constexpr int line_vectors = 8;
constexpr int line_bytes = line_vectors * 16;
constexpr int line_length = line_vectors * width;  // in k
constexpr int stage_bytes = (ROWS + COLUMNS) * line_bytes;
constexpr int lines_at_once = threads / line_vectors;  // of one copy by all threads
static_assert(ROWS % lines_at_once == 0 && COLUMNS % lines_at_once == 0, "whole copies");

// Tiles of columns that blocks go through for one tile of rows before the next: x then stays in the cache for them.
constexpr int columns_in_turn = 8;

struct Problem {
    const scalar_t* x;       // rows of k elements
    const scalar_t* weight;  // [experts, n, k]
    const scalar_t* bias;    // [experts, n] or null
    void* y;                 // rows of n elements, float if `float_out`
    const int* tokens;       // the row of x of each row of y; null: its own number
    const int* offsets;      // [experts + 1]; null: every expert has `rows_each` rows
    int experts, row_tiles, n, k, rows_each;
    bool float_out;

    __device__ __forceinline__ int begin_of(int expert) const {
        return offsets == nullptr ? expert * rows_each : load_activation_element(offsets + expert);
    }
};

// What this block computes; rows == 0: nothing.
struct Tile {
    int expert, first_row, rows, first_column, columns;
};

// ---- which tile

__device__ __forceinline__ int tiles_of(int begin, int end) { return (end - begin + ROWS - 1) / ROWS; }

// Tiles of rows are numbered expert by expert. Every lane counts those of a run of experts; the one whose run has the
// tile tells the others. Every warp does the same.
__device__ __forceinline__ Tile find_tile(const Problem& p) {
    const int column_tiles = (p.n + COLUMNS - 1) / COLUMNS;
    const int turn = blockIdx.x / (columns_in_turn * p.row_tiles), place = blockIdx.x % (columns_in_turn * p.row_tiles);
    const int in_turn = min(columns_in_turn, column_tiles - turn * columns_in_turn);
    Tile tile;
    tile.first_column = (turn * columns_in_turn + place % in_turn) * COLUMNS;
    tile.columns = min(COLUMNS, p.n - tile.first_column);
    const int number = place / in_turn;

    const int run = (p.experts + warp_size - 1) / warp_size;
    const int first = min(lane_id() * run, p.experts), last = min(first + run, p.experts);
    const int run_begin = p.begin_of(first);
    int begin = run_begin, tiles = 0;
    for (int expert = first; expert < last; expert++) {
        const int end = p.begin_of(expert + 1);
        tiles += tiles_of(begin, end);
        begin = end;
    }
    int up_to_here = tiles;
#pragma unroll
    for (int distance = 1; distance < warp_size; distance *= 2) {
        const int other = shuffle(up_to_here, lane_id() - distance);
        if (lane_id() >= distance) up_to_here += other;
    }
    const int left = number - (up_to_here - tiles);  // tiles of this lane's run before the one that is looked for
    const u32 owner = ballot(left >= 0 && left < tiles);
    tile.expert = tile.first_row = tile.rows = 0;
    if (owner == 0) return tile;
    begin = run_begin;
    for (int expert = first, before = 0; expert < last; expert++) {
        const int end = p.begin_of(expert + 1), here = tiles_of(begin, end);
        if (left >= before && left < before + here) {
            tile.expert = expert;
            tile.first_row = begin + (left - before) * ROWS;
            tile.rows = min(ROWS, end - tile.first_row);
        }
        before += here;
        begin = end;
    }
    const u32 lane = __ffs(static_cast<int>(owner)) - 1;
    tile.expert = shuffle(tile.expert, lane);
    tile.first_row = shuffle(tile.first_row, lane);
    tile.rows = shuffle(tile.rows, lane);
    return tile;
}

// ---- stages in shared memory: the lines of x, then those of W

// Where a vector of a line is. Vectors are swapped so that no two lanes of an access are in the same banks: neither two
// lines with four neighbouring vectors each, as tensor cores want them, nor eight lines with one.
__device__ __forceinline__ u32 place_of(int line, int vector) {
    return line * line_bytes + (vector ^ ((line & 1) << 2 | (line >> 1 & 3))) * 16;
}

struct Loader {
    const scalar_t *x, *weight;  // this thread's vector of the first line in turn
    u32 place;
    int first_line, rows_of_weight, k;

    __device__ __forceinline__ Loader(const Problem& p, const Tile& tile) {
        const int vector = threadIdx.x % line_vectors * width;
        first_line = threadIdx.x / line_vectors;
        place = place_of(first_line, threadIdx.x % line_vectors);
        x = p.x + vector;
        weight = p.weight + (static_cast<i64>(tile.expert) * p.n + tile.first_column + first_line) * p.k + vector;
        rows_of_weight = tile.columns;
        k = p.k;
    }
    // Zeros arrive beyond K and for rows that do not exist.
    __device__ __forceinline__ void load(u32 stage, int at, const int* tokens) const {
        const bool inside = at + static_cast<int>(threadIdx.x) % line_vectors * width < k;
#pragma unroll
        for (int i = 0; i < COLUMNS; i += lines_at_once)
            cp_async_16(stage + (ROWS + i) * line_bytes + place, weight + static_cast<i64>(i) * k + at,
                        inside && first_line + i < rows_of_weight);
#pragma unroll
        for (int i = 0; i < ROWS; i += lines_at_once) {
            const int token = tokens[first_line + i];
            cp_async_16(stage + i * line_bytes + place, x + static_cast<i64>(token) * k + at, inside && token >= 0);
        }
    }
};

// ---- results

__device__ __forceinline__ float bias_of(const Problem& p, const Tile& tile, int column) {
    if (!p.bias || column >= tile.columns) return 0.0f;
    return to_float(p.bias[static_cast<i64>(tile.expert) * p.n + tile.first_column + column]);
}

// Where a row of the tile begins in y.
__device__ __forceinline__ i64 start_of(const Problem& p, const Tile& tile, int row) {
    return static_cast<i64>(tile.first_row + row) * p.n + tile.first_column;
}

// Lane t of each four gives the values t of four vectors, and receives the vector number t.
__device__ __forceinline__ void transpose_of_four(u32 (&v)[4]) {
    const bool odd = lane_id() & 1, upper = lane_id() & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 other = shuffle_xor(odd ? v[i] : v[i + 1], 1);
        (odd ? v[i] : v[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 other = shuffle_xor(upper ? v[i] : v[i + 2], 2);
        (upper ? v[i] : v[i + 2]) = other;
    }
}

// ---- tiles on tensor cores. A is x, B is W: a warp has `row_parts` times 16 rows and `column_parts` times 8 columns

template <class T> struct TensorCoreSums {
    static constexpr int warps_along_rows = ROWS >= 64 ? 2 : 1;
    static constexpr int warps_along_columns = threads / warp_size / warps_along_rows;
    static constexpr int rows_of_warp = ROWS / warps_along_rows, columns_of_warp = COLUMNS / warps_along_columns;
    static constexpr int row_parts = rows_of_warp / 16, column_parts = columns_of_warp / 8;
    float c[row_parts][column_parts][4] = {};

    static __device__ __forceinline__ int first_row() { return warp_id() / warps_along_columns * rows_of_warp; }
    static __device__ __forceinline__ int first_column() { return warp_id() % warps_along_columns * columns_of_warp; }
    // Whether this warp has rows; if not, it only helps to load.
    static __device__ __forceinline__ bool is_needed(int rows) { return first_row() < rows; }

    __device__ __forceinline__ void add(u32 stage) {
        const u32 own = place_of(lane_id() / 4, lane_id() % 4);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 x = stage + first_row() * line_bytes + (own ^ half * 64);
            const u32 weight = stage + (ROWS + first_column()) * line_bytes + (own ^ half * 64);
            uint4 low[row_parts], high[row_parts];
#pragma unroll
            for (int i = 0; i < row_parts; i++) {
                low[i] = load_shared(x + i * 16 * line_bytes);
                high[i] = load_shared(x + (i * 16 + 8) * line_bytes);
            }
#pragma unroll
            for (int j = 0; j < column_parts; j++) {
                const uint4 b = load_shared(weight + j * 8 * line_bytes);
#pragma unroll
                for (int i = 0; i < row_parts; i++)
                    mma_m16n8k16<T>(c[i][j], low[i].x, high[i].x, low[i].y, high[i].y, b.x, b.y);
#pragma unroll
                for (int i = 0; i < row_parts; i++)
                    mma_m16n8k16<T>(c[i][j], low[i].z, high[i].z, low[i].w, high[i].w, b.z, b.w);
            }
        }
    }

    __device__ __forceinline__ void store(const Problem& p, const Tile& tile) {
#pragma unroll
        for (int j = 0; j < column_parts; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float bias = bias_of(p, tile, first_column() + j * 8 + lane_id() % 4 * 2 + e);
#pragma unroll
                for (int i = 0; i < row_parts; i++) c[i][j][e] += bias, c[i][j][2 + e] += bias;
            }
#pragma unroll
        for (int i = 0; i < row_parts; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = first_row() + i * 16 + half * 8 + lane_id() / 4;
                if (p.float_out) store_floats(p, tile, row, i, half);
                else store_rounded(p, tile, row, i, half);
            }
    }
    __device__ __forceinline__ void store_floats(const Problem& p, const Tile& tile, int row, int i, int half) const {
        float* to = static_cast<float*>(p.y) + start_of(p, tile, row);
#pragma unroll
        for (int j = 0; j < column_parts; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int column = first_column() + j * 8 + lane_id() % 4 * 2 + e;
                if (row < tile.rows && column < tile.columns) to[column] = c[i][j][half * 2 + e];
            }
    }
    // Of four parts of 8 columns each lane stores one.
    __device__ __forceinline__ void store_rounded(const Problem& p, const Tile& tile, int row, int i, int half) const {
        T* to = static_cast<T*>(p.y) + start_of(p, tile, row);
#pragma unroll
        for (int j = 0; j < column_parts; j += 4) {
            u32 v[4];
#pragma unroll
            for (int e = 0; e < 4; e++)
                v[e] = j + e < column_parts ? pack2<T>(c[i][min(j + e, column_parts - 1)][half * 2],
                                                       c[i][min(j + e, column_parts - 1)][half * 2 + 1]) : 0;
            transpose_of_four(v);
            const int part = j + lane_id() % 4, column = first_column() + part * 8;
            if (part >= column_parts || row >= tile.rows) continue;
            if (p.n % width == 0 && column < tile.columns) {
                store_vector(to + column, make_uint4(v[0], v[1], v[2], v[3]));
            } else {
#pragma unroll
                for (int e = 0; e < width; e++)
                    if (column + e < tile.columns) to[column + e] = T{static_cast<u16>(v[e / 2] >> e % 2 * 16)};
            }
        }
    }
};

// ---- tiles in plain float: 16 threads share 4 rows and have the columns at their place + 16 j

struct FloatSums {
    static constexpr int own_rows = 4, sharers = 16, own_columns = COLUMNS / sharers;
    float c[own_rows][own_columns] = {};

    static __device__ __forceinline__ int row(int i) { return threadIdx.x / sharers * own_rows + i; }
    static __device__ __forceinline__ int column(int j) { return threadIdx.x % sharers + j * sharers; }
    static __device__ __forceinline__ bool is_needed(int rows) {
        return warp_id() * (warp_size / sharers * own_rows) < rows;
    }

    __device__ __forceinline__ void add(u32 stage) {
#pragma unroll 2
        for (int vector = 0; vector < line_vectors; vector++) {
            float x[own_rows][4];
#pragma unroll
            for (int i = 0; i < own_rows; i++) unpack<float>(load_shared(stage + place_of(row(i), vector)), x[i]);
#pragma unroll
            for (int j = 0; j < own_columns; j++) {
                float w[4];
                unpack<float>(load_shared(stage + ROWS * line_bytes + place_of(column(j), vector)), w);
#pragma unroll
                for (int i = 0; i < own_rows; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) c[i][j] = fmaf(x[i][e], w[e], c[i][j]);
            }
        }
    }
    __device__ __forceinline__ void store(const Problem& p, const Tile& tile) const {
#pragma unroll
        for (int j = 0; j < own_columns; j++) {
            const float bias = bias_of(p, tile, column(j));
#pragma unroll
            for (int i = 0; i < own_rows; i++)
                if (row(i) < tile.rows && column(j) < tile.columns)
                    static_cast<float*>(p.y)[start_of(p, tile, row(i)) + column(j)] = c[i][j] + bias;
        }
    }
};

template <class T> struct SumsOf { typedef TensorCoreSums<T> type; };
template <> struct SumsOf<float> { typedef FloatSums type; };

// Grid: row_tiles * tiles of columns; row_tiles: as many as the rows can make.
extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
grouped_gemm(const scalar_t* x, const scalar_t* weight, const scalar_t* bias, void* y, const int* tokens,
             const int* offsets, int experts, int row_tiles, int n, int k, int rows_each,
             int float_out) {
    __shared__ int token_of_row[ROWS];  // -1: no such row
    const Problem p = {x, weight, bias, y, tokens, offsets, experts, row_tiles, n, k, rows_each, float_out != 0};
    const u32 stages = shared_address(dynamic_shared());
    pdl_wait();
    const Tile tile = find_tile(p);
    if (tile.rows == 0) return;
    for (int row = threadIdx.x; row < ROWS; row += threads) {
        int token = row < tile.rows ? tile.first_row + row : -1;
        if (tokens && token >= 0) token = load_activation_element(tokens + token);
        token_of_row[row] = token;
    }
    __syncthreads();

    const Loader loader(p, tile);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i * line_length < k) loader.load(stages + i * stage_bytes, i * line_length, token_of_row);
        cp_async_commit();
    }
    SumsOf<scalar_t>::type sums;
    const bool needed = sums.is_needed(tile.rows);
    u32 stage = 0, next = (STAGES - 1) * stage_bytes;
#pragma unroll 1
    for (int at = 0; at < k; at += line_length) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this stage is there, and the one before is done with
        const int later = at + (STAGES - 1) * line_length;
        if (later < k) loader.load(stages + next, later, token_of_row);
        cp_async_commit();
        if (needed) sums.add(stages + stage);
        stage = stage == (STAGES - 1) * stage_bytes ? 0 : stage + stage_bytes;
        next = next == (STAGES - 1) * stage_bytes ? 0 : next + stage_bytes;
    }
    pdl_launch_dependents();
    if (needed) sums.store(p, tile);
}
