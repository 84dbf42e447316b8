// Attention of one new token per request over the paged key-value cache. Specification: attention.py.
//
// A task is one split of one request (decode_plan.cu) for one key-value head and up to 8 * HEAD_TILES of the query
// heads that share it. A fixed number of blocks stride over all tasks. The four warps of a block take tiles of 16
// tokens in turn, merge their results and, where the request has several splits, leave a partial result; whoever
// comes last merges the partial results in the order of the splits. So every sum has an order that depends on the
// request's own length only.
//
// Keys and values go from global memory straight into tensor core operands, by loads of 16 bytes. The products are
// transposed (tokens x heads, dims x heads): tokens and dims fill the 16 rows of an mma, 8 heads its columns. The
// loads of a tile's keys (values) start as soon as those of the tile before are used up, also across tasks.
//
// With ROTARY the queries come from the projection and are turned on their way; the warp that has a request's newest
// token turns its key as well, uses it and the value at once, and leaves both in the cache. All other keys and values
// are older than the step, so that their loads need not wait for the kernel before. The same bits as rotary_kv_write
// (rotary.cu) and then this kernel without ROTARY.
//
// The lengths and the lookup table are there before a step starts, and decode_plan.cu lets no kernel start before the
// plan is: these are read before pdl_wait.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16 HEAD_DIM=64,80,96,128 HEAD_TILES=1,2
// variants: DTYPE=BF16,F16,F32 HEAD_DIM=256 HEAD_TILES=1
// variants: DTYPE=F32 HEAD_DIM=64,80,96,128 HEAD_TILES=1
// variants: DTYPE=BF16,F16 HEAD_DIM=64,128 HEAD_TILES=1,2 ROTARY
// variants: DTYPE=F32 HEAD_DIM=64,128 HEAD_TILES=1 ROTARY
#include "device.cuh"
#include "rotary.cuh"

#ifdef ROTARY
constexpr bool rotates = true;
#else
constexpr bool rotates = false;
#endif

constexpr int warps = 4;
constexpr int tile = 16;                    // tokens a warp takes at a time
constexpr int block_tokens = warps * tile;  // tokens the block takes at a time
constexpr int max_heads = 8 * HEAD_TILES;   // query heads of a task
constexpr int fan_in = 32;                  // partial results merged at once, one a lane
constexpr int columns = (HEAD_DIM + 127) / 128;  // groups of 4 dims a lane owns where a warp holds a whole row
constexpr int result_stride = HEAD_DIM + 4;      // of rows in shared memory
constexpr bool tensor_cores = !same_type<scalar_t, float>;
constexpr int blocks_per_sm = tensor_cores && HEAD_DIM <= 128 && HEAD_TILES == 1 ? 3 : 2;
// Keys and values of a tile do not fit into registers beside the results: its second half of the values is loaded
// when its keys have been used, and the next keys only after the values.
constexpr bool in_halves = HEAD_DIM == 256;
constexpr float log2_e = 1.4426950408889634f;

// What a launch is about; the names are those of the kernel's parameters.
struct Arguments {
    const scalar_t* q;
    const float *cos, *sin;
    scalar_t* pages;
    const int* lookup_table;
    const uint4* plan;
    const float* sinks;
    scalar_t* out;
    float* partials;
    u32* counters;
    int capacity, max_pages, page_size, kv_heads, group;
    float score_scale, cap;

    __device__ __forceinline__ int head_groups() const { return rotates ? 1 : (group + max_heads - 1) / max_heads; }
    __device__ __forceinline__ int tasks_per_item() const { return kv_heads * head_groups(); }
    __device__ __forceinline__ int query_heads() const { return kv_heads * group; }
    // The row of q of a request: its query heads and, where they are turned here, its key heads and value heads.
    __device__ __forceinline__ const scalar_t* row(int request) const {
        return q + static_cast<i64>(request) * (query_heads() + (rotates ? 2 * kv_heads : 0)) * HEAD_DIM;
    }
};

// Few members, as two of them are held in registers: the rest is computed where it is needed.
struct Task {
    int index, request;
    u32 place;           // which split | of how many << 16
    int first, last;     // the split's tokens
    int page, page_row;  // in lane i: where this warp's i-th tile starts

    __device__ __forceinline__ int split() const { return place & 0xffff; }
    __device__ __forceinline__ int splits() const { return place >> 16; }
    // Its number in the plan, which is the place of its partial result, and which of the item's tasks it is.
    __device__ __forceinline__ int item(const Arguments& a) const { return index / a.tasks_per_item(); }
    __device__ __forceinline__ int part(const Arguments& a) const { return index % a.tasks_per_item(); }
    __device__ __forceinline__ int kv_head(const Arguments& a) const { return part(a) / a.head_groups(); }
    __device__ __forceinline__ int first_in_group(const Arguments& a) const {
        return part(a) % a.head_groups() * max_heads;
    }
    __device__ __forceinline__ int heads(const Arguments& a) const {
        return min(a.group - first_in_group(a), max_heads);
    }
    __device__ __forceinline__ int head(const Arguments& a) const { return kv_head(a) * a.group + first_in_group(a); }

    __device__ __forceinline__ int rounds() const {
        return (last - first / tile * tile + block_tokens - 1) / block_tokens;
    }
    __device__ __forceinline__ int tile_start(int i) const {
        return first / tile * tile + i * block_tokens + warp_id() * tile;
    }
};

// Where a tile's keys and values are. Only its rows low .. high may be read: the others belong to no token that
// is attended to, and may hold anything. Who needs one of those takes the nearest of these instead, and masks it. A
// tile beyond the end of the split is empty: it is a row of the last tile, which is loaded but not used.
struct Tile {
    scalar_t *keys, *values;
    int low, high;

    __device__ __forceinline__ bool is_empty() const { return high < low; }
    __device__ __forceinline__ int nearest(int row) const { return max(min(row, high), low); }
    __device__ __forceinline__ int offset(int row) const { return nearest(row) * HEAD_DIM; }
};

// The item of task `index`; anything where there is no such task.
__device__ __forceinline__ uint4 load_item(const Arguments& a, int index) {
    const int item = index / a.tasks_per_item();
    return load_weight_if(item < a.capacity, a.plan + 1 + item);
}

// Nothing here waits for the page numbers to arrive.
__device__ __forceinline__ Task make_task(const Arguments& a, int index, uint4 item) {
    Task task;
    task.index = index;
    task.request = item.x;
    task.place = item.y;
    task.first = item.z;
    task.last = item.w;
    const int token = min(task.tile_start(lane_id()), (task.last - 1) / tile * tile);
    const int page = token / a.page_size;
    task.page = a.lookup_table[static_cast<i64>(task.request) * a.max_pages + page];
    task.page_row = token - page * a.page_size;
    return task;
}

// This warp's i-th tile.
__device__ __forceinline__ Tile find_tile(const Arguments& a, const Task& task, int i) {
    const int start = task.tile_start(i);
    const i64 head_page = (static_cast<i64>(shuffle(task.page, i)) * 2) * a.kv_heads + task.kv_head(a);
    Tile found;
    found.keys = a.pages + (head_page * a.page_size + shuffle(task.page_row, i)) * HEAD_DIM;
    found.values = found.keys + static_cast<i64>(a.kv_heads) * a.page_size * HEAD_DIM;
    found.high = min(task.last - 1 - start, tile - 1);
    found.low = max(task.first - start, 0);
    return found;
}

// 16 bytes of keys or values.
__device__ __forceinline__ uint4 load_cached(const scalar_t* p) {
    if constexpr (rotates) return load_weight(p);  // older than the step, or written by this warp
    else return load_activation_streamed(p);
}

// The newest token of a request, whose key (not yet turned) and value are still in the projection.
struct NewToken {
    int round;  // which of this warp's tiles has it, -1 if none
    const scalar_t *key, *value;

    __device__ __forceinline__ NewToken(const Arguments& a, const Task& task) {
        const int tiles_before = (task.last - 1) / tile - task.first / tile;
        const bool is_here = task.split() == task.splits() - 1 && tiles_before % warps == warp_id();
        round = is_here ? tiles_before / warps : -1;
        key = a.row(task.request) + (a.query_heads() + task.kv_head(a)) * HEAD_DIM;
        value = key + a.kv_heads * HEAD_DIM;
    }
    __device__ __forceinline__ bool is_here() const { return round >= 0; }
    static __device__ __forceinline__ int row(const Task& task) { return (task.last - 1) % tile; }

    // The place of its key and value in the cache.
    __device__ __forceinline__ Tile place(const Arguments& a, const Task& task) const {
        Tile at = find_tile(a, task, round);
        at.keys += row(task) * HEAD_DIM;
        at.values += row(task) * HEAD_DIM;
        return at;
    }
};

// 2^(v - peak), and 0 where both are -inf.
__device__ __forceinline__ float weight_below(float v, float peak) {
    return exp2_approx(v - (peak == negative_infinity() ? 0.0f : peak));
}

// q.k -> the exponent of 2 that the softmax is made of.
__device__ __forceinline__ float exponent(const Arguments& a, float score) {
    const float v = score * a.score_scale;
    if (a.cap == 0.0f) return v;
    if constexpr (!tensor_cores) return a.cap * tanhf(v);
    // tanh by its definition: good to 2^-22 of the cap, where tanh_approx has 2^-11.
    return a.cap * (1.0f - 2.0f * reciprocal_approx(exp2_approx(2.0f * log2_e * v) + 1.0f));
}

// ---- dynamic shared memory: for tensor cores the queries as each lane needs them and, with ROTARY, a row of cosines
// and one of sines; then the result of each warp for each head: peak and total of its weights, and a row of values that
// are yet to be divided by the total.

constexpr int angles_offset = (HEAD_DIM + 31) / 32 * HEAD_TILES * warp_size * static_cast<int>(sizeof(uint4));
constexpr int query_bytes =  // of one warp
    tensor_cores ? angles_offset + (rotates ? HEAD_DIM * static_cast<int>(sizeof(float)) : 0) : 0;

__device__ __forceinline__ float2* warp_stats(int warp, int head) {
    return dynamic_shared<float2>() + warps * query_bytes / sizeof(float2) + warp * max_heads + head;
}
__device__ __forceinline__ float* warp_row(int warp, int head, int heads) {
    return reinterpret_cast<float*>(warp_stats(warps, 0)) + (warp * heads + head) * result_stride;
}

// ---- what a warp computes: keys and values of one tile after the other

// With g = lane / 4 and t = lane % 4, this lane's heads are 8n + 2t and 8n + 2t + 1, its dims 64c + 8g .. + 7.
template <class T> struct Attention {
    static constexpr int key_chunks = (HEAD_DIM + 31) / 32, value_chunks = (HEAD_DIM + 63) / 64;
    static constexpr int early_chunks = in_halves ? value_chunks / 2 : value_chunks;  // of values, loaded a tile ahead

    uint4 keys[key_chunks][2];        // tokens g and g + 8, dims 32c + 8t .. + 7
    uint4 values[value_chunks][4];    // tokens 2t, 2t + 1, 2t + 8, 2t + 9, dims 64c + 8g .. + 7
    float out[HEAD_TILES][value_chunks][4][4];  // [n][c][i]: dims 64c + 8g + 2i (both heads), 64c + 8g + 2i + 1 (both)
    float scores[HEAD_TILES][4];      // token g (both heads), token g + 8 (both heads)
    float peak[HEAD_TILES][2], total[HEAD_TILES][2];

    static __device__ __forceinline__ int g() { return lane_id() / 4; }
    static __device__ __forceinline__ int t() { return lane_id() % 4; }
    static __device__ __forceinline__ int value_row(int i) { return 2 * t() + i % 2 + i / 2 * 8; }

    // Of a part of the queries that this lane alone writes and reads.
    static __device__ __forceinline__ u32 query_address(int c, int n) {
        return shared_address(dynamic_shared()) + warp_id() * query_bytes +
               ((c * HEAD_TILES + n) * warp_size + lane_id()) * sizeof(uint4);
    }

    // Of this warp's cosines, with the sines behind them.
    static __device__ __forceinline__ u32 angles_address() {
        return shared_address(dynamic_shared()) + warp_id() * query_bytes + angles_offset;
    }

    // at: the first tile of the task, whose loads were started before.
    __device__ __forceinline__ void begin(const Arguments& a, const Task& task, const Tile& at) {
        if constexpr (rotates) rotate(a, task, at);
        else cp_async_wait<0>();
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
            peak[n][0] = peak[n][1] = negative_infinity();
            total[n][0] = total[n][1] = 0.0f;
#pragma unroll
            for (int c = 0; c < value_chunks; c++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    out[n][c][i][0] = out[n][c][i][1] = out[n][c][i][2] = out[n][c][i][3] = 0.0f;
        }
    }

    // Head 8n + g of the task, dims as in `keys`; zeros beyond the head's dims and for heads that do not exist.
    __device__ __forceinline__ void load_queries(const Arguments& a, const Task& task) {
        const T* q = a.row(task.request) + task.head(a) * HEAD_DIM;
        const int heads = task.heads(a);
#pragma unroll
        for (int c = 0; c < key_chunks; c++)
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) {
                const int head = 8 * n + g(), dim = 32 * c + 8 * t();
                cp_async_16(query_address(c, n), q + head * HEAD_DIM + dim, head < heads && dim < HEAD_DIM);
            }
        if constexpr (rotates) {
            const int half = HEAD_DIM / 2, i = 4 * lane_id();
            const float* angles = (i < half ? a.cos : a.sin) + static_cast<i64>(task.request) * half + i % half;
            if (i < HEAD_DIM) cp_async_16(angles_address() + i * sizeof(float), angles);
        }
        cp_async_commit();
    }

    // Of the pairs whose first channels are in chunk c.
    static __device__ __forceinline__ void load_angles(int c, float (&cos)[8], float (&sin)[8]) {
        const u32 address = angles_address() + (32 * c + 8 * t()) * sizeof(float);
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float part[2][4];
            unpack<float>(load_shared(address + i * sizeof(float)), part[0]);
            unpack<float>(load_shared(address + (HEAD_DIM / 2 + i) * sizeof(float)), part[1]);
#pragma unroll
            for (int j = 0; j < 4; j++) cos[i + j] = part[0][j], sin[i + j] = part[1][j];
        }
    }

    // Eight pairs of channels.
    static __device__ __forceinline__ void turn_chunks(uint4& x, uint4& y, const float (&cos)[8],
                                                       const float (&sin)[8]) {
        float first[8], second[8];
        unpack<T>(x, first);
        unpack<T>(y, second);
#pragma unroll
        for (int i = 0; i < 8; i++) turn(first[i], second[i], cos[i], sin[i]);
        x = pack<T>(first);
        y = pack<T>(second);
    }

    // Turns the queries and, if it is here, the new token's key, which goes into the cache with its value. A lane has
    // both channels of a pair, and the same pairs of all queries and of the key.
    __device__ __forceinline__ void rotate(const Arguments& a, const Task& task, const Tile& at) {
        constexpr int pairs = key_chunks / 2;
        const NewToken token(a, task);
        if (token.round == 0) load_new_token(token, task, at);
        cp_async_wait<0>();
        __syncwarp();
#pragma unroll
        for (int c = 0; c < pairs; c++) {
            float cos[8], sin[8];
            load_angles(c, cos, sin);
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) {
                const u32 first = query_address(c, n), second = query_address(c + pairs, n);
                uint4 query[2] = {load_shared(first), load_shared(second)};
                turn_chunks(query[0], query[1], cos, sin);
                store_shared(first, query[0]);
                store_shared(second, query[1]);
            }
        }
        if (token.is_here()) store_new_token(a, task, token);
    }

    // Of the tile that is on its way: the new token's row, with the key as it is, and the values of who takes that row
    // for another. (Other rows' keys have no effect.)
    __device__ __forceinline__ void load_new_token(const NewToken& token, const Task& task, const Tile& at) {
#pragma unroll
        for (int row = 0; row < 2; row++)
            if (8 * row + g() == token.row(task))
#pragma unroll
                for (int c = 0; c < key_chunks; c++) keys[c][row] = load_activation(token.key + 32 * c + 8 * t());
#pragma unroll
        for (int row = 0; row < 4; row++)
            if (at.nearest(value_row(row)) == token.row(task))
#pragma unroll
                for (int c = 0; c < value_chunks; c++) values[c][row] = load_activation(token.value + 64 * c + 8 * g());
    }

    __device__ __forceinline__ void store_new_token(const Arguments& a, const Task& task, const NewToken& token) {
        constexpr int pairs = key_chunks / 2;
        const int token_row = token.row(task);
        const bool is_loaded = token.round == 0, is_low = token_row < 8, is_mine = token_row % 8 == g();
        const Tile place = token.place(a, task);
#pragma unroll
        for (int c = 0; c < pairs; c++) {
            float cos[8], sin[8];
            load_angles(c, cos, sin);
            const int dims[2] = {32 * c + 8 * t(), 32 * (c + pairs) + 8 * t()};
            uint4 key[2];
#pragma unroll
            for (int i = 0; i < 2; i++)
                key[i] = is_loaded ? (is_low ? keys[c + i * pairs][0] : keys[c + i * pairs][1])
                                   : load_activation(token.key + dims[i]);
            turn_chunks(key[0], key[1], cos, sin);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (is_mine) store_vector(place.keys + dims[i], key[i]);
                if (is_mine && is_loaded && is_low) keys[c + i * pairs][0] = key[i];
                if (is_mine && is_loaded && !is_low) keys[c + i * pairs][1] = key[i];
            }
        }
        if (is_loaded) {
#pragma unroll
            for (int row = 0; row < 4; row++)
                if (value_row(row) == token_row)
#pragma unroll
                    for (int c = 0; c < value_chunks; c++)
                        store_vector(place.values + 64 * c + 8 * g(), values[c][row]);
        } else {
            const int dim = 8 * lane_id();
            if (dim < HEAD_DIM) store_vector(place.values + dim, load_activation(token.value + dim));
            __syncwarp();  // this warp reads the token's tile from the cache
        }
    }

    // Beyond the head's dims lanes read what their neighbours read; the queries are 0 there.
    __device__ __forceinline__ void load_keys(const Tile& at) {
#pragma unroll
        for (int row = 0; row < 2; row++)
#pragma unroll
            for (int c = 0; c < key_chunks; c++)
                keys[c][row] = load_cached(at.keys + at.offset(8 * row + g()) + min(32 * c + 8 * t(), HEAD_DIM - 8));
    }

    // As for keys; the products of repeated dims are not stored.
    __device__ __forceinline__ void load_values(const Tile& at) { load_values<0, early_chunks>(at); }
    __device__ __forceinline__ void load_late_values(const Tile& at) { load_values<early_chunks, value_chunks>(at); }
    template <int begin, int end> __device__ __forceinline__ void load_values(const Tile& at) {
#pragma unroll
        for (int row = 0; row < 4; row++)
#pragma unroll
            for (int c = begin; c < end; c++)
                values[c][row] =
                    load_cached(at.values + at.offset(value_row(row)) + min(64 * c + 8 * g(), HEAD_DIM - 8));
    }

    // A permutation of the dims that is the same for both operands leaves a product as it is: 4 consecutive dims of
    // a lane stand for dims 2t, 2t + 1, 2t + 8, 2t + 9 of an mma.
    __device__ __forceinline__ void multiply_keys(const Arguments&, int, int, int, int) {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
        for (int c = 0; c < key_chunks; c++)
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) {
                const uint4 q = load_shared(query_address(c, n));
                const uint4 low = keys[c][0], high = keys[c][1];
                mma_m16n8k16<T>(scores[n], low.x, high.x, low.y, high.y, q.x, q.y);
                mma_m16n8k16<T>(scores[n], low.z, high.z, low.w, high.w, q.z, q.w);
            }
    }

    // The scores of the tile that starts at token `start` become weights relative to the greatest score so far.
    __device__ __forceinline__ void softmax(const Arguments& a, int start, int first, int last) {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int token = start + g() + e / 2 * 8;
                scores[n][e] = token < first || token >= last ? negative_infinity() : exponent(a, scores[n][e]);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float highest = fmaxf(peak[n][h], fmaxf(scores[n][h], scores[n][h + 2]));
#pragma unroll
                for (int distance = 4; distance < warp_size; distance *= 2)
                    highest = fmaxf(highest, shuffle_xor(highest, distance));
                const float factor = weight_below(peak[n][h], highest);
                peak[n][h] = highest;
                scores[n][h] = weight_below(scores[n][h], highest);
                scores[n][h + 2] = weight_below(scores[n][h + 2], highest);
                total[n][h] = total[n][h] * factor + (scores[n][h] + scores[n][h + 2]);
#pragma unroll
                for (int c = 0; c < value_chunks; c++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        out[n][c][i][h] *= factor;
                        out[n][c][i][h + 2] *= factor;
                    }
            }
        }
    }

    __device__ __forceinline__ void multiply_values() {
        u32 weights[HEAD_TILES][2];
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
            weights[n][0] = transpose_8x8(pack2<T>(scores[n][0], scores[n][1]));
            weights[n][1] = transpose_8x8(pack2<T>(scores[n][2], scores[n][3]));
        }
#pragma unroll
        for (int c = 0; c < value_chunks; c++) {
            u32 words[4][4];
#pragma unroll
            for (int row = 0; row < 4; row++) {
                words[row][0] = values[c][row].x, words[row][1] = values[c][row].y;
                words[row][2] = values[c][row].z, words[row][3] = values[c][row].w;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Two tokens of one dim beside each other: the low halves of two words, and the high halves.
                const u32 a0 = __byte_perm(words[0][i], words[1][i], 0x5410);
                const u32 a1 = __byte_perm(words[0][i], words[1][i], 0x7632);
                const u32 a2 = __byte_perm(words[2][i], words[3][i], 0x5410);
                const u32 a3 = __byte_perm(words[2][i], words[3][i], 0x7632);
#pragma unroll
                for (int n = 0; n < HEAD_TILES; n++)
                    mma_m16n8k16<T>(out[n][c][i], a0, a1, a2, a3, weights[n][0], weights[n][1]);
            }
        }
    }

    __device__ __forceinline__ void store(int heads) const {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float sum = total[n][h];
#pragma unroll
                for (int distance = 4; distance < warp_size; distance *= 2) sum += shuffle_xor(sum, distance);
                const int head = 8 * n + 2 * t() + h;
                if (head >= heads) continue;
                if (g() == 0) *warp_stats(warp_id(), head) = make_float2(peak[n][h], sum);
                float* row = warp_row(warp_id(), head, heads);
#pragma unroll
                for (int c = 0; c < value_chunks; c++) {
                    if (64 * c + 8 * g() >= HEAD_DIM) continue;
#pragma unroll
                    for (int i = 0; i < 4; i += 2) {
                        const float(&low)[4] = out[n][c][i], (&high)[4] = out[n][c][i + 1];
                        *reinterpret_cast<float4*>(row + 64 * c + 8 * g() + 2 * i) =
                            make_float4(low[h], low[h + 2], high[h], high[h + 2]);
                    }
                }
            }
    }
};

// float32 has no tensor cores that keep its precision: lanes share the dims of a row, a few tokens at a time. All work
// is in multiply_keys, which knows the tile before the next one replaces it.
template <> struct Attention<float> {
    static constexpr int step = 4 / columns;  // tokens whose loads are under way together

    float q[max_heads][columns][4], out[max_heads][columns][4];
    float peak[max_heads], total[max_heads];
    Tile at;

    static __device__ __forceinline__ int dim(int i) { return (i * warp_size + lane_id()) * 4; }

    __device__ __forceinline__ void load_row(const scalar_t* p, float (&row)[columns][4]) {
#pragma unroll
        for (int i = 0; i < columns; i++)
            unpack<float>(dim(i) < HEAD_DIM ? load_activation(p + dim(i)) : make_uint4(0, 0, 0, 0), row[i]);
    }

    __device__ __forceinline__ void begin(const Arguments& a, const Task& task, const Tile&) {
        const scalar_t* heads = a.row(task.request) + task.head(a) * HEAD_DIM;
#pragma unroll
        for (int h = 0; h < max_heads; h++) {
            peak[h] = negative_infinity();
            total[h] = 0.0f;
            if (h < task.heads(a)) load_row(heads + h * HEAD_DIM, q[h]);
#pragma unroll
            for (int i = 0; i < columns; i++) out[h][i][0] = out[h][i][1] = out[h][i][2] = out[h][i][3] = 0.0f;
        }
        if constexpr (rotates) turn_rows(a, task);
    }

    // Turns the queries and, if it is here, the new token's key, which goes into the cache with its value.
    __device__ __forceinline__ void turn_rows(const Arguments& a, const Task& task) {
        const i64 angles = static_cast<i64>(task.request) * (HEAD_DIM / 2) + dim(0) % (HEAD_DIM / 2);
        const NewToken token(a, task);
        float cos[4], sin[4], key[columns][4], value[columns][4];
        unpack<float>(load_activation(a.cos + angles), cos);
        unpack<float>(load_activation(a.sin + angles), sin);
        if (token.is_here()) {
            load_row(token.key, key);
            load_row(token.value, value);
        }
#pragma unroll
        for (int h = 0; h < max_heads; h++)
            if (h < task.heads(a)) turn_row(q[h][0], cos, sin);
        if (!token.is_here()) return;
        turn_row(key[0], cos, sin);
        const Tile place = token.place(a, task);
        if (dim(0) < HEAD_DIM) {
            store_vector(place.keys + dim(0), pack<float>(key[0]));
            store_vector(place.values + dim(0), pack<float>(value[0]));
        }
        __syncwarp();  // it is read from the cache by this warp
    }

    // The other channel of a pair is another lane's.
    static __device__ __forceinline__ void turn_row(float (&x)[4], const float (&cos)[4], const float (&sin)[4]) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float other = shuffle_xor(x[e], HEAD_DIM / 8);
            const bool is_first = dim(0) < HEAD_DIM / 2;
            float first = is_first ? x[e] : other, second = is_first ? other : x[e];
            turn(first, second, cos[e], sin[e]);
            x[e] = is_first ? first : second;
        }
    }

    __device__ __forceinline__ void load_queries(const Arguments&, const Task&) {}
    __device__ __forceinline__ void load_keys(const Tile& next) { at = next; }
    __device__ __forceinline__ void load_values(const Tile&) {}
    __device__ __forceinline__ void load_late_values(const Tile&) {}
    __device__ __forceinline__ void softmax(const Arguments&, int, int, int) {}
    __device__ __forceinline__ void multiply_values() {}

    __device__ __forceinline__ void multiply_keys(const Arguments& a, int start, int first, int last, int n_heads) {
#pragma unroll 1
        for (int row = 0; row < tile; row += step) {
            if (start + row + step <= first || start + row >= last) continue;
            float keys[step][columns][4], values[step][columns][4];
#pragma unroll
            for (int j = 0; j < step; j++) {
                load_row(at.keys + at.offset(row + j), keys[j]);
                load_row(at.values + at.offset(row + j), values[j]);
            }
#pragma unroll
            for (int h = 0; h < max_heads; h++)
                if (h < n_heads) add_tokens(a, h, start + row, first, last, keys, values);
        }
    }

    __device__ __forceinline__ void add_tokens(const Arguments& a, int h, int start, int first, int last,
                                               const float (&keys)[step][columns][4],
                                               const float (&values)[step][columns][4]) {
        float weights[step], highest = peak[h];
#pragma unroll
        for (int j = 0; j < step; j++) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < columns; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) dot = fmaf(q[h][i][e], keys[j][i][e], dot);
            dot = warp_sum(dot);
            weights[j] = start + j < first || start + j >= last ? negative_infinity() : exponent(a, dot);
            highest = fmaxf(highest, weights[j]);
        }
        const float factor = weight_below(peak[h], highest);
        peak[h] = highest;
        total[h] *= factor;
#pragma unroll
        for (int i = 0; i < columns; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) out[h][i][e] *= factor;
#pragma unroll
        for (int j = 0; j < step; j++) {
            const float weight = weight_below(weights[j], highest);
            total[h] += weight;
#pragma unroll
            for (int i = 0; i < columns; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[h][i][e] = fmaf(weight, values[j][i][e], out[h][i][e]);
        }
    }

    __device__ __forceinline__ void store(int n_heads) const {
#pragma unroll
        for (int h = 0; h < max_heads; h++) {
            if (h >= n_heads) continue;
            if (lane_id() == 0) *warp_stats(warp_id(), h) = make_float2(peak[h], total[h]);
            float* row = warp_row(warp_id(), h, n_heads);
#pragma unroll
            for (int i = 0; i < columns; i++)
                if (dim(i) < HEAD_DIM)
                    *reinterpret_cast<float4*>(row + dim(i)) =
                        make_float4(out[h][i][0], out[h][i][1], out[h][i][2], out[h][i][3]);
        }
    }
};

// ---- merging. A warp holds the row of one head: a lane has dims 128i + 4 lane .. + 3.

struct Row {
    float values[columns][4];
    float peak, total;

    static __device__ __forceinline__ int dim(int i) { return (i * warp_size + lane_id()) * 4; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < columns; i++) values[i][0] = values[i][1] = values[i][2] = values[i][3] = 0.0f;
    }
    __device__ __forceinline__ void add(int i, float weight, const float (&other)[4]) {
#pragma unroll
        for (int e = 0; e < 4; e++) values[i][e] = fmaf(weight, other[e], values[i][e]);
    }
};

// The four warps' results for one head.
__device__ __forceinline__ Row merge_warps(int head, int heads) {
    Row row;
    row.clear();
    row.peak = negative_infinity();
    row.total = 0.0f;
#pragma unroll
    for (int w = 0; w < warps; w++) row.peak = fmaxf(row.peak, warp_stats(w, head)->x);
#pragma unroll
    for (int w = 0; w < warps; w++) {
        const float2 stats = *warp_stats(w, head);
        const float weight = weight_below(stats.x, row.peak);
        row.total += weight * stats.y;
#pragma unroll
        for (int i = 0; i < columns; i++) {
            if (Row::dim(i) >= HEAD_DIM) continue;
            const float* p = warp_row(w, head, heads) + Row::dim(i);
            const float4 v = *reinterpret_cast<const float4*>(p);
            row.add(i, weight, {v.x, v.y, v.z, v.w});
        }
    }
    return row;
}

// Partial results: [capacity, query heads, HEAD_DIM] values, then as many pairs of peak and total.
__device__ __forceinline__ i64 partial_index(const Arguments& a, int item, int head) {
    return static_cast<i64>(item) * a.query_heads() + head;
}
__device__ __forceinline__ float* partial_values(const Arguments& a, int item, int head) {
    return a.partials + partial_index(a, item, head) * HEAD_DIM;
}
__device__ __forceinline__ float2* partial_stats(const Arguments& a, int item, int head) {
    return reinterpret_cast<float2*>(partial_values(a, a.capacity, 0)) + partial_index(a, item, head);
}

__device__ __forceinline__ void store_partial(const Arguments& a, const Row& row, int item, int head) {
    if (lane_id() == 0) *partial_stats(a, item, head) = make_float2(row.peak, row.total);
#pragma unroll
    for (int i = 0; i < columns; i++)
        if (Row::dim(i) < HEAD_DIM)
            store_vector(partial_values(a, item, head) + Row::dim(i), pack<float>(row.values[i]));
}

// The partial results of items item, item + stride, ..., `count` of them, added up in this order. in_flight: values
// that a lane loads together.
template <int in_flight>
__device__ __forceinline__ Row merge_partials(const Arguments& a, int item, int stride, int count, int head) {
    constexpr int step = in_flight / 4 / columns;
    float2 stats = make_float2(negative_infinity(), 0.0f);
    if (lane_id() < count) stats = load_activation_element(partial_stats(a, item + lane_id() * stride, head));
    Row row;
    row.clear();
    float weight;
#pragma unroll 1
    for (int k = 0; k < count; k += step) {
        float loaded[step][columns][4];
#pragma unroll
        for (int j = 0; j < step; j++)
#pragma unroll
            for (int i = 0; i < columns; i++) {
                const bool inside = k + j < count && Row::dim(i) < HEAD_DIM;
                const float* p = partial_values(a, item + (k + j) * stride, head) + Row::dim(i);
                unpack<float>(load_activation_if(inside, p), loaded[j][i]);
            }
        if (k == 0) {
            row.peak = warp_max(stats.x);
            weight = weight_below(stats.x, row.peak);
            row.total = warp_sum(weight * stats.y);
        }
#pragma unroll
        for (int j = 0; j < step; j++) {
            const float factor = shuffle(weight, k + j);
#pragma unroll
            for (int i = 0; i < columns; i++) row.add(i, factor, loaded[j][i]);
        }
    }
    return row;
}

// 4 values, rounded.
__device__ __forceinline__ void store_four(float* p, const float (&v)[4]) { store_vector(p, pack<float>(v)); }
template <class T> __device__ __forceinline__ void store_four(T* p, const float (&v)[4]) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
}

// The head's result: the sink takes part in the softmax here, once.
__device__ __forceinline__ void store_output(const Arguments& a, const Row& row, int request, int head) {
    const float sink = a.sinks == nullptr ? negative_infinity() : a.sinks[head] * log2_e;
    const float peak = fmaxf(row.peak, sink);
    const float weight = weight_below(row.peak, peak), total = row.total * weight + weight_below(sink, peak);
    const float factor = total == 0.0f ? 0.0f : weight / total;
    scalar_t* out = a.out + (static_cast<i64>(request) * a.query_heads() + head) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < columns; i++) {
        float y[4];
#pragma unroll
        for (int e = 0; e < 4; e++) y[e] = row.values[i][e] * factor;
        if (Row::dim(i) < HEAD_DIM) store_four(out + Row::dim(i), y);
    }
}

// Counts this warp in at `counter`; whether it is the last of `count`, and may read what the others wrote. The counter
// is 0 again then.
__device__ __forceinline__ bool is_last(u32* counter, int count) {
    __syncwarp();
    u32 arrived = 0;
    if (lane_id() == 0) arrived = atomic_add_acq_rel(counter, 1);
    arrived = shuffle(arrived, 0);
    __syncwarp();
    if (static_cast<int>(arrived) != count - 1) return false;
    if (lane_id() == 0) *counter = 0;
    return true;
}

// Merges 32 splits at a time into one where the first of them was, until one is left. Each warp does this for its own
// heads with counters of its own; at merge number `level` of a group they belong to item first + level.
template <int in_flight> __device__ __forceinline__ void merge_splits(const Arguments& a, const Task& task) {
    const int base = task.item(a) - task.split();
    int nodes = task.splits(), node = task.split(), stride = 1;
    for (int level = 0; nodes > 1; level++) {
        const int group = node / fan_in, count = min(nodes - group * fan_in, fan_in);
        const int first = base + group * fan_in * stride;
        u32* counters = a.counters + (static_cast<i64>(first + level) * a.tasks_per_item() + task.part(a)) * warps;
        if (count > 1 && !is_last(counters + warp_id(), count)) return;
        for (int h = warp_id(); h < task.heads(a); h += warps) {
            const Row row = merge_partials<in_flight>(a, first, stride, count, task.head(a) + h);
            if (nodes <= fan_in) store_output(a, row, task.request, task.head(a) + h);
            else store_partial(a, row, first, task.head(a) + h);
        }
        nodes = (nodes + fan_in - 1) / fan_in;
        node = group;
        stride *= fan_in;
    }
}

// Brings the results of the four warps together. Each warp goes on with heads of its own.
template <int in_flight>
__device__ __forceinline__ void finish(const Arguments& a, const Task& task, const Attention<scalar_t>& attention) {
    __syncthreads();  // the results of the task before have been read
    attention.store(task.heads(a));
    __syncthreads();
    if (warp_id() >= task.heads(a)) return;
    for (int h = warp_id(); h < task.heads(a); h += warps) {
        const Row row = merge_warps(h, task.heads(a));
        if (task.splits() == 1) store_output(a, row, task.request, task.head(a) + h);
        else store_partial(a, row, task.item(a), task.head(a) + h);
    }
    merge_splits<in_flight>(a, task);
}

// Requests of no tokens, which pad a batch, get zeros. first_length: that of request blockIdx.x, if there is one.
__device__ __forceinline__ void clear_empty_requests(const Arguments& a, const int* kv_lengths, int batch,
                                                     int first_length) {
    const int vectors = a.query_heads() * HEAD_DIM / vector_size<scalar_t>;
    for (int request = blockIdx.x, length = first_length; request < batch; request += gridDim.x) {
        if (request != static_cast<int>(blockIdx.x)) length = kv_lengths[request];
        if (length > 0) continue;
        scalar_t* out = a.out + static_cast<i64>(request) * vectors * vector_size<scalar_t>;
        for (int i = threadIdx.x; i < vectors; i += blockDim.x)
            store_vector(out + i * vector_size<scalar_t>, make_uint4(0, 0, 0, 0));
    }
}

// out[b] = attention of q[b] [kv_heads * group, HEAD_DIM] over the tokens that the plan gives to request b.
// q, out: [batch, kv_heads * group, HEAD_DIM]; with ROTARY, q: [batch, kv_heads * (group + 2), HEAD_DIM], the query,
// key and value heads of the newest token of each request, and cos, sin: [batch, HEAD_DIM / 2]; else these are null.
// pages: [P, 2, kv_heads, page_size, HEAD_DIM]; lookup_table: [batch, max_pages]; sinks: null or [heads]; plan: 1 +
// capacity items; partials: capacity * heads * (HEAD_DIM + 2) values; counters: capacity * tasks per item * 4, all 0
// before and after. A score is multiplied by score_scale, which gives an exponent of 2; with cap it is cap * tanh(score
// * score_scale).
extern "C" __global__ void __launch_bounds__(warps * warp_size, blocks_per_sm)
decode_attention(const scalar_t* q, const float* cos, const float* sin, scalar_t* pages, const int* lookup_table,
                 const int* kv_lengths, const uint4* plan, const float* sinks, scalar_t* out, float* partials,
                 u32* counters, int batch, int capacity, int max_pages, int page_size, int kv_heads, int group,
                 float score_scale, float cap) {
    const Arguments a{q,        cos,      sin,       pages,     lookup_table, plan,  sinks,       out, partials,
                      counters, capacity, max_pages, page_size, kv_heads,     group, score_scale, cap};
    Attention<scalar_t> attention;
    pdl_launch_dependents();
    const int stride = gridDim.x;
    const uint4 item = load_item(a, blockIdx.x);
    const int tasks = load_weight(plan).x * a.tasks_per_item();
    const int first_length = static_cast<int>(blockIdx.x) < batch ? kv_lengths[blockIdx.x] : 1;
    if (static_cast<int>(blockIdx.x) >= tasks) {
        pdl_wait();
        return clear_empty_requests(a, kv_lengths, batch, first_length);
    }
    Task task = make_task(a, blockIdx.x, item);
    Tile at = find_tile(a, task, 0);
    if (!rotates) pdl_wait();  // for the newest keys and values
    attention.load_keys(at);
    attention.load_values(at);
    if (rotates) pdl_wait();
    attention.load_queries(a, task);
    clear_empty_requests(a, kv_lengths, batch, first_length);
    for (;;) {
        const bool is_final = task.index + stride >= tasks;
        const uint4 next_item = load_item(a, task.index + stride);
        attention.begin(a, task, at);
        const Task next = is_final ? task : make_task(a, task.index + stride, next_item);
        const int rounds = task.rounds();
        for (int i = 0; i < rounds; i++) {
            const bool ends = i + 1 == rounds, more = !ends || !is_final, has_tokens = !at.is_empty();
            if (has_tokens) attention.multiply_keys(a, task.tile_start(i), task.first, task.last, task.heads(a));
            attention.load_late_values(at);
            if (!ends) at = find_tile(a, task, i + 1);
            else if (!is_final) at = find_tile(a, next, 0);
            if (ends && !is_final) attention.load_queries(a, next);
            if (more && !in_halves) attention.load_keys(at);
            if (has_tokens) {
                attention.softmax(a, task.tile_start(i), task.first, task.last);
                attention.multiply_values();
            }
            if (more && in_halves) attention.load_keys(at);
            if (more) attention.load_values(at);
        }
        if (is_final) return finish<in_halves ? 32 : 64>(a, task, attention);
        finish<32>(a, task, attention);  // the next keys and values are in registers
        task = next;
    }
}
