// Causal attention of a ragged batch over the paged key-value cache, for requests that bring many new tokens.
// Specification: attention.py.
//
// A block computes rows of one key-value head: row r is token r / group with query head r % group of that head's
// `group`, so the heads that share keys share their loads too, and a short chunk fills the tile. It walks the blocks
// of keys from the rows' last position down, with running softmax. Blocks begin at multiples of `key_block` in the
// sequence, and one that a row does not see leaves that row's numbers as they are to the bit: the result of a row
// depends neither on the chunk nor on the batch that it is computed in.
//
// bf16 and f16 run on tensor cores; float keeps all its bits by plain multiply-adds.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32 HEAD_DIM=64,80,96,128,256
#include "device.cuh"

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

// ---- rows on tensor cores: a warp has `warp_tiles` tiles of 16 rows; of each, a lane has rows lane / 4 and
// lane / 4 + 8, and of every 8 columns the two at 2 (lane % 4)

template <class T> struct TensorCoreRows {
    float weighted[warp_tiles][HEAD_DIM / 8][4];  // sums of values
    float scores[warp_tiles][key_block / 8][4];   // then their weights
    float peaks[warp_tiles][2], totals[warp_tiles][2];

    __device__ __forceinline__ static int row(int tile, int half) {
        return warp_id() * warp_rows + tile * 16 + half * 8 + lane_id() / 4;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < warp_tiles; i++) {
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] = 0.0f;
            peaks[i][0] = peaks[i][1] = negative_infinity();
            totals[i][0] = totals[i][1] = 0.0f;
        }
    }

    // The queries are read again for every block: there are no registers to keep them.
    __device__ __forceinline__ void multiply_keys(u32 queries, u32 keys) {
        const int lane = lane_id();
        queries += (warp_id() * warp_rows + lane % 16) * row_bytes + lane / 16 * 16;
        keys += (lane % 8 + lane / 16 * 8) * row_bytes + lane / 8 % 2 * 16;
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) scores[i][j][e] = 0.0f;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            u32 a[warp_tiles][4];
#pragma unroll
            for (int i = 0; i < warp_tiles; i++) ldmatrix_x4(a[i], queries + i * 16 * row_bytes + k * 32);
#pragma unroll
            for (int j = 0; j < key_block / 8; j += 2) {
                u32 b[4];
                ldmatrix_x4(b, keys + j * 8 * row_bytes + k * 32);
#pragma unroll
                for (int i = 0; i < warp_tiles; i++) {
                    mma_m16n8k16<T>(scores[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                    mma_m16n8k16<T>(scores[i][j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
                }
            }
        }
    }

    __device__ __forceinline__ void cap_scores(const Problem& p) {
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    scores[i][j][e] = soft_capped(scores[i][j][e] * p.score_factor, p.softcap);
    }

    __device__ __forceinline__ void mask(const RowTable& table, int first_key, int window) {
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int position = table.position[row(i, half)];
#pragma unroll
                for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (!sees(position, first_key + j * 8 + lane_id() % 4 * 2 + e, window))
                            scores[i][j][2 * half + e] = negative_infinity();
            }
    }

    __device__ __forceinline__ void scores_to_weights(float exponent_factor) {
        float factors[warp_tiles][2];
        bool risen = false;
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float greatest = negative_infinity();
#pragma unroll
                for (int j = 0; j < key_block / 8; j++)
                    greatest = fmaxf(greatest, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
                greatest = fmaxf(greatest, shuffle_xor(greatest, 1));
                greatest = fmaxf(greatest, shuffle_xor(greatest, 2));
                float base, sum = 0.0f;
                factors[i][half] = raise_peak(peaks[i][half], greatest * exponent_factor, base);
                risen |= factors[i][half] != 1.0f;
#pragma unroll
                for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        scores[i][j][e] = exp2_approx(fmaf(scores[i][j][e], exponent_factor, -base));
                        sum += scores[i][j][e];
                    }
                totals[i][half] = fmaf(totals[i][half], factors[i][half], sum);
            }
        // Peaks seldom rise after the first blocks.
        if (ballot(risen) != 0) scale_sums(factors);
    }

    __device__ __forceinline__ void scale_sums(const float (&factors)[warp_tiles][2]) {
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] *= factors[i][e / 2];
    }

    __device__ __forceinline__ void multiply_values(u32 values, unsigned char*) {
        values += lane_id() % 16 * row_bytes + lane_id() / 16 * 16;
#pragma unroll
        for (int k = 0; k < key_block / 16; k++) {
            u32 a[warp_tiles][4];
#pragma unroll
            for (int i = 0; i < warp_tiles; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    a[i][e] = pack2<T>(scores[i][2 * k + e / 2][e % 2 * 2], scores[i][2 * k + e / 2][e % 2 * 2 + 1]);
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j += 2) {
                u32 b[4];
                ldmatrix_x4_trans(b, values + k * 16 * row_bytes + j * 16);
#pragma unroll
                for (int i = 0; i < warp_tiles; i++) {
                    mma_m16n8k16<T>(weighted[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                    mma_m16n8k16<T>(weighted[i][j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
                }
            }
        }
    }

    // Through the warp's own rows of the queries' tile, to write whole vectors.
    __device__ __forceinline__ void store(const Problem& p, const Work& w, const RowTable& table,
                                          unsigned char* queries) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float total = totals[i][half];
                total += shuffle_xor(total, 1);
                total += shuffle_xor(total, 2);
                const int r = row(i, half);
                const float factor = reciprocal_total(total, peaks[i][half], p.sinks, table.head[r]);
                u32* to = reinterpret_cast<u32*>(queries + r * row_bytes) + lane_id() % 4;
#pragma unroll
                for (int j = 0; j < HEAD_DIM / 8; j++)
                    to[j * 4] = pack2<T>(weighted[i][j][2 * half] * factor, weighted[i][j][2 * half + 1] * factor);
            }
        __syncwarp();
#pragma unroll 4
        for (int i = lane_id(); i < warp_rows * row_vectors; i += warp_size) {
            const int r = warp_id() * warp_rows + i / row_vectors, v = i % row_vectors;
            if (table.position[r] < 0) continue;
            const i64 row = static_cast<i64>(table.position[r] + w.row_minus_position) * p.n_heads + table.head[r];
            const uint4 result = load_shared(shared_address(queries) + r * row_bytes + v * 16);
            store_vector(p.out + row * HEAD_DIM + v * width, result);
        }
    }
};

// ---- rows in plain float: 16 threads share 4 rows; a thread has the keys at its place + 16 j, and the vectors of
// the head dimension at its place + 16 j

template <class T> struct FloatRows {
    static constexpr int own_rows = 4, sharers = 16;
    static constexpr int own_keys = key_block / sharers, own_vectors = (HEAD_DIM / 4 + sharers - 1) / sharers;

    float weighted[own_rows][own_vectors][4];
    float scores[own_rows][own_keys];
    float peaks[own_rows], totals[own_rows];

    __device__ __forceinline__ static int place() { return threadIdx.x % sharers; }
    __device__ __forceinline__ static int row(int i) { return threadIdx.x / sharers * own_rows + i; }
    __device__ __forceinline__ static bool has_vector(int j) { return place() + j * sharers < HEAD_DIM / 4; }

    __device__ __forceinline__ static float largest(float v) {
#pragma unroll
        for (int distance = sharers / 2; distance > 0; distance /= 2) v = fmaxf(v, shuffle_xor(v, distance));
        return v;
    }
    __device__ __forceinline__ static float summed(float v) {
#pragma unroll
        for (int distance = sharers / 2; distance > 0; distance /= 2) v += shuffle_xor(v, distance);
        return v;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < own_rows; i++) {
            peaks[i] = negative_infinity();
            totals[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < own_vectors; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] = 0.0f;
        }
    }

    __device__ __forceinline__ void multiply_keys(u32 queries, u32 keys) {
#pragma unroll
        for (int i = 0; i < own_rows; i++)
#pragma unroll
            for (int j = 0; j < own_keys; j++) scores[i][j] = 0.0f;
#pragma unroll 2
        for (int d = 0; d < HEAD_DIM / 4; d++) {
            float k[own_keys][4];
#pragma unroll
            for (int j = 0; j < own_keys; j++)
                unpack<T>(load_shared(keys + (place() + j * sharers) * row_bytes + d * 16), k[j]);
#pragma unroll
            for (int i = 0; i < own_rows; i++) {
                float q[4];
                unpack<T>(load_shared(queries + row(i) * row_bytes + d * 16), q);
#pragma unroll
                for (int j = 0; j < own_keys; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) scores[i][j] = fmaf(q[e], k[j][e], scores[i][j]);
            }
        }
    }

    __device__ __forceinline__ void cap_scores(const Problem& p) {
#pragma unroll
        for (int i = 0; i < own_rows; i++)
#pragma unroll
            for (int j = 0; j < own_keys; j++) scores[i][j] = soft_capped(scores[i][j] * p.score_factor, p.softcap);
    }

    __device__ __forceinline__ void mask(const RowTable& table, int first_key, int window) {
#pragma unroll
        for (int i = 0; i < own_rows; i++)
#pragma unroll
            for (int j = 0; j < own_keys; j++)
                if (!sees(table.position[row(i)], first_key + place() + j * sharers, window))
                    scores[i][j] = negative_infinity();
    }

    __device__ __forceinline__ void scores_to_weights(float exponent_factor) {
#pragma unroll
        for (int i = 0; i < own_rows; i++) {
            float greatest = negative_infinity();
#pragma unroll
            for (int j = 0; j < own_keys; j++) greatest = fmaxf(greatest, scores[i][j]);
            float base, sum = 0.0f;
            const float factor = raise_peak(peaks[i], largest(greatest) * exponent_factor, base);
#pragma unroll
            for (int j = 0; j < own_keys; j++) {
                scores[i][j] = exp2_approx(fmaf(scores[i][j], exponent_factor, -base));
                sum += scores[i][j];
            }
            totals[i] = fmaf(totals[i], factor, sum);
#pragma unroll
            for (int j = 0; j < own_vectors; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] *= factor;
        }
    }

    // Every thread needs the weights of all keys: they pass through shared memory, within the warp.
    __device__ __forceinline__ void multiply_values(u32 values, unsigned char* weights) {
#pragma unroll
        for (int i = 0; i < own_rows; i++)
#pragma unroll
            for (int j = 0; j < own_keys; j++)
                reinterpret_cast<float*>(weights + row(i) * probability_bytes)[place() + j * sharers] = scores[i][j];
        __syncwarp();
#pragma unroll 2
        for (int k = 0; k < key_block; k += 4) {
            float weight[own_rows][4];
#pragma unroll
            for (int i = 0; i < own_rows; i++)
                unpack<T>(load_shared(shared_address(weights) + row(i) * probability_bytes + k * 4), weight[i]);
#pragma unroll
            for (int e = 0; e < 4; e++) add_value(values + (k + e) * row_bytes, weight, e);
        }
    }

    __device__ __forceinline__ void add_value(u32 value_row, const float (&weight)[own_rows][4], int key) {
#pragma unroll
        for (int j = 0; j < own_vectors; j++) {
            if (!has_vector(j)) continue;
            float value[4];
            unpack<T>(load_shared(value_row + (place() + j * sharers) * 16), value);
#pragma unroll
            for (int i = 0; i < own_rows; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    weighted[i][j][e] = fmaf(weight[i][key], value[e], weighted[i][j][e]);
        }
    }

    __device__ __forceinline__ void store(const Problem& p, const Work& w, const RowTable& table, unsigned char*) {
#pragma unroll
        for (int i = 0; i < own_rows; i++) {
            const float total = summed(totals[i]);
            const int position = table.position[row(i)], head = table.head[row(i)];
            if (position < 0) continue;
            const float factor = reciprocal_total(total, peaks[i], p.sinks, head);
            const i64 to = static_cast<i64>(position + w.row_minus_position) * p.n_heads + head;
#pragma unroll
            for (int j = 0; j < own_vectors; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] *= factor;
                if (has_vector(j))
                    store_vector(p.out + to * HEAD_DIM + (place() + j * sharers) * width, pack<T>(weighted[i][j]));
            }
        }
    }
};

// ---- the walk

// Whether any row of this warp sees any key of the block.
__device__ __forceinline__ bool warp_sees(const RowTable& table, int first_key, int window) {
    const int position = table.position[warp_id() * warp_rows + lane_id() % warp_rows];
    return ballot(position >= first_key && position - window < first_key + key_block - 1) != 0;
}

template <class Rows> __device__ __forceinline__ void attend(const Problem& p) {
    __shared__ RowTable table;
    unsigned char* shared = dynamic_shared();
    const u32 queries = shared_address(shared);
    const u32 tiles = queries + block_rows * row_bytes;
    unsigned char* weights = shared + block_rows * row_bytes + 4 * tile_bytes;
    pdl_wait();
    const Work w = read_work(p);
    if (w.rows <= 0) return;
    fill_row_table(p, w, table);
    __syncthreads();

    int block = w.last_position / key_block;
    u32 stage = tiles, pages = look_up_pages(p, w, block);
    load_queries(p, w, table, queries);
    load_keys_and_values(p, w, stage, block, pages);
    cp_async_commit();
    pages = look_up_pages(p, w, block - 1);
    // A chunk of few tokens leaves warps without rows: they only help to load.
    const bool has_rows = warp_id() * warp_rows < w.rows;
    Rows rows;
    rows.clear();
#pragma unroll 1
    for (; (block + 1) * key_block > w.first_key; block--) {
        const int first_key = block * key_block;
        const u32 keys = stage, values = stage + tile_bytes;
        stage = tiles + (stage == tiles ? 2 * tile_bytes : 0);
        cp_async_wait<0>();
        __syncthreads();  // this block is there, and the one before is done with
        if (first_key > w.first_key) {
            load_keys_and_values(p, w, stage, block - 1, pages);
            cp_async_commit();
            pages = look_up_pages(p, w, block - 2);
        }
        const bool ends_later = first_key + key_block - 1 > w.first_position;
        const bool partly_seen = ends_later || first_key <= w.last_position - p.window;
        if (!has_rows || (partly_seen && !warp_sees(table, first_key, p.window))) continue;
        rows.multiply_keys(queries, keys);
        if (p.softcap != 0.0f) rows.cap_scores(p);
        if (partly_seen) rows.mask(table, first_key, p.window);
        rows.scores_to_weights(p.exponent_factor);
        rows.multiply_values(values, weights);
    }
    pdl_launch_dependents();
    rows.store(p, w, table, shared);
}

template <class T> struct RowsOf { typedef TensorCoreRows<T> type; };
template <> struct RowsOf<float> { typedef FloatRows<float> type; };

// out[T, n_heads, D] = attention of q[T, n_heads, D], whose tokens are q_stride elements apart, over
// pages[P, 2, n_kv_heads, page_size, D]. work_list[n_items, 2]: request (-1: none) and the first of the
// 128 / (n_heads / n_kv_heads) tokens of an item; grid: n_items * parts * n_kv_heads. sinks may be null.
extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
prefill_attention(const scalar_t* q, const scalar_t* pages, const float* sinks, scalar_t* out, const int* lookup_table,
                  const int* input_row_offsets, const int* cache_lengths, const int* work_list, i64 q_stride,
                  u64 page_groups_reciprocal, int table_width, int page_size, int n_heads, int n_kv_heads, int window,
                  float softcap, float score_factor, float exponent_factor) {
    attend<RowsOf<scalar_t>::type>(
        {q, pages, sinks, out, lookup_table, input_row_offsets, cache_lengths, work_list, q_stride,
         page_groups_reciprocal, table_width, page_size, n_heads, n_kv_heads, window, softcap, score_factor,
         exponent_factor});
}
