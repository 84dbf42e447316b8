// What both kinds of rows of prefill_attention.cu share: sizes, the work of a block, loading, and running softmax.
#pragma once

constexpr bool on_tensor_cores = !same_type<scalar_t, float>;
constexpr int item_rows = 128;  // of one entry of the work list, which `parts` blocks share
constexpr int block_rows = on_tensor_cores ? 128 : 32;
constexpr int parts = item_rows / block_rows;
// So few that scores and sums stay in registers, and that two stages of keys and values fit in shared memory.
constexpr int key_block = on_tensor_cores ? (HEAD_DIM >= 128 ? 32 : 64) : (HEAD_DIM >= 256 ? 16 : 32);
constexpr int warp_tiles = HEAD_DIM == 256 ? 1 : 2;  // of 16 rows, which share every fragment of keys and values
constexpr int threads = on_tensor_cores ? block_rows / (16 * warp_tiles) * warp_size : 128;
constexpr int blocks_per_sm = HEAD_DIM == 256 && on_tensor_cores ? 1 : 2;
constexpr int warp_rows = block_rows / (threads / warp_size);

constexpr int width = vector_size<scalar_t>;
constexpr int row_vectors = HEAD_DIM / width;
// An odd number of 16-byte vectors: eight rows at one column lie in different banks.
constexpr int row_bytes = (row_vectors + 1) * 16;
constexpr int tile_bytes = key_block * row_bytes;  // of keys or values
constexpr int probability_bytes = (key_block + 4) * 4;  // of a row of float probabilities in shared memory
// Keys are looked up by groups of 16, which never straddle a page.
constexpr int group_keys = 16;
constexpr int block_groups = key_block / group_keys;
static_assert(block_rows * row_vectors % threads == 0 && key_block * row_vectors % threads == 0, "whole copies");

constexpr float log2_e = 1.4426950408889634f;

struct Problem {
    const scalar_t* q;
    const scalar_t* pages;
    const float* sinks;
    scalar_t* out;
    const int* lookup_table;
    const int* input_row_offsets;
    const int* cache_lengths;
    const int* work_list;
    i64 q_stride;
    u64 page_groups_reciprocal;  // 2^40 / (page_size / 16), rounded up
    int table_width, page_size, n_heads, n_kv_heads, window;
    float softcap;          // 0: none
    float score_factor;     // score = q k * this; under soft-capping already divided by the cap
    float exponent_factor;  // log2(weight) = capped score, or q k if there is no cap, * this
};

struct RowTable {
    int position[block_rows];  // of the row's token in its sequence, -1: no such row
    int head[block_rows];
};

// What this block does.
struct Work {
    const int* page_numbers;
    int kv_head;
    int first_row, rows;  // of the item's packed rows; rows <= 0: nothing to do
    int first_token_position;  // of the item
    int row_minus_position;  // row of a token in the batch minus its position
    int first_position, last_position;
    int first_key;  // that any row sees
};

// ---- what to do, and where the data is

__device__ __forceinline__ Work read_work(const Problem& p) {
    Work w;
    const int group = p.n_heads / p.n_kv_heads;
    const int item = blockIdx.x / p.n_kv_heads / parts;
    const int request = load_activation_element(p.work_list + 2 * item);
    w.rows = 0;
    if (request < 0) return w;
    const int first_token = load_activation_element(p.work_list + 2 * item + 1);
    const int begin = load_activation_element(p.input_row_offsets + request);
    const int end = load_activation_element(p.input_row_offsets + request + 1);
    const int cached = load_activation_element(p.cache_lengths + request);
    w.kv_head = blockIdx.x % p.n_kv_heads;
    w.page_numbers = p.lookup_table + static_cast<i64>(request) * p.table_width;
    w.first_row = blockIdx.x / p.n_kv_heads % parts * block_rows;
    w.rows = min(block_rows, min(item_rows / group, end - begin - first_token) * group - w.first_row);
    w.first_token_position = cached + first_token;
    w.row_minus_position = begin - cached;
    w.first_position = w.first_token_position + w.first_row / group;
    w.last_position = w.first_token_position + (w.first_row + w.rows - 1) / group;
    w.first_key = max(0, w.first_position - p.window + 1);
    return w;
}

__device__ __forceinline__ void fill_row_table(const Problem& p, const Work& w, RowTable& table) {
    const int group = p.n_heads / p.n_kv_heads;
    for (int r = threadIdx.x; r < block_rows; r += threads) {
        table.position[r] = r < w.rows ? w.first_token_position + (w.first_row + r) / group : -1;
        table.head[r] = w.kv_head * group + (w.first_row + r) % group;
    }
}

__device__ __forceinline__ void load_queries(const Problem& p, const Work& w, const RowTable& table, u32 tile) {
#pragma unroll 2
    for (int i = 0; i < block_rows * row_vectors / threads; i++) {
        const int index = i * threads + threadIdx.x, r = index / row_vectors, v = index % row_vectors;
        const int position = table.position[r];
        const i64 row = position < 0 ? 0 : position + w.row_minus_position;
        const scalar_t* from = p.q + row * p.q_stride + table.head[r] * HEAD_DIM + v * width;
        cp_async_16(tile + r * row_bytes + v * 16, from, position >= 0);
    }
}

// group / (page_size / 16), the page of the sequence that a group of keys lies in; exact below 2^24 groups.
__device__ __forceinline__ u32 page_of_group(const Problem& p, int group) {
    return static_cast<u64>(group) * p.page_groups_reciprocal >> 40;
}

// Lane i receives the number of the page that has the block's i-th group of keys. Groups that no row sees are not
// looked up: their entries in the table, and the pages, may hold anything.
__device__ __forceinline__ u32 look_up_pages(const Problem& p, const Work& w, int block) {
    const int group = block * block_groups + lane_id(), first = group * group_keys;
    const bool seen = first <= w.last_position && first + group_keys > w.first_key;
    if (block < 0 || lane_id() >= block_groups || !seen) return 0;
    return load_activation_element(w.page_numbers + page_of_group(p, group));
}

// Starts the copy of a block of keys, and of values behind them; `pages` is what `look_up_pages` gave a block earlier,
// so that nothing waits for it. Zeros arrive where no row looks, because a weight of zero does not cancel a NaN that
// is left in the memory of a page.
__device__ __forceinline__ void load_keys_and_values(const Problem& p, const Work& w, u32 tiles, int block,
                                                     u32 pages) {
    const u32 page_groups = static_cast<u32>(p.page_size) / group_keys, group = block * block_groups + lane_id();
    // Where lane i's group is, counted in groups from the start of the pool.
    const u32 place = pages * (2 * p.n_kv_heads * page_groups) + group - page_of_group(p, group) * page_groups;
    const i64 head_stride = static_cast<i64>(p.page_size) * HEAD_DIM;
    const scalar_t* keys = p.pages + w.kv_head * head_stride;
    const scalar_t* values = keys + p.n_kv_heads * head_stride;
    const u32 first = block * key_block - w.first_key, last = w.last_position - w.first_key;
#pragma unroll 2
    for (u32 i = 0; i < key_block * row_vectors / threads; i++) {
        const u32 index = i * threads + threadIdx.x, r = index / row_vectors, v = index % row_vectors;
        const u64 offset = static_cast<u64>(shuffle(place, r / group_keys)) * (group_keys * HEAD_DIM) +
                           (r % group_keys * HEAD_DIM + v * width);
        const u32 to = tiles + r * row_bytes + v * 16;
        const bool seen = first + r <= last;
        cp_async_16(to, keys + offset, seen);
        cp_async_16(to + tile_bytes, values + offset, seen);
    }
}

// ---- running softmax of a row

// cap * tanh(score / cap), `x` = score / cap. Without tensor cores all bits count.
__device__ __forceinline__ float soft_capped(float x, float cap) {
    if constexpr (on_tensor_cores) {
        const float r = rsqrt_approx(exp2_approx(x * (2 * log2_e)) + 1.0f);
        return fmaf(-2.0f * cap, r * r, cap);
    } else {
        return cap * tanhf(x);
    }
}

// Takes the greatest logarithm of a weight in a new block into `peak`. Returns the factor that brings earlier sums to
// the new peak, exactly 1 if it stays; `base` is the peak, or 0 as long as the row has seen no key. Infinity masks, not
// a large number: the rounding error of a large number is a large number.
__device__ __forceinline__ float raise_peak(float& peak, float of_block, float& base) {
    const float raised = fmaxf(peak, of_block);
    base = raised == negative_infinity() ? 0.0f : raised;
    const float factor = exp2_approx(peak - base);
    peak = raised;
    return factor;
}

// 1 / the whole sum of weights, with the sink's.
__device__ __forceinline__ float reciprocal_total(float total, float peak, const float* sinks, int head) {
    if (sinks != nullptr) total += exp2_approx(fmaf(load_activation_element(sinks + head), log2_e, -peak));
    return 1.0f / total;
}

__device__ __forceinline__ bool sees(int position, int key, int window) {
    return key <= position && key > position - window;
}
