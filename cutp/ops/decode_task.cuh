// What the files of decode_attention.cu share: sizes, the work of a block and of its warps, where keys and values are,
// the softmax of a score, and shared memory.
#pragma once

#ifdef ROTARY
constexpr bool rotates = true;
#else
constexpr bool rotates = false;
#endif

constexpr int warps = 4;
constexpr int tile = 16;                    // tokens a warp takes at a time
constexpr int block_tokens = warps * tile;  // tokens the block takes at a time
constexpr int max_heads = 8 * HEAD_TILES;   // query heads of a task
constexpr int columns = (HEAD_DIM + 127) / 128;  // groups of 4 dims a lane owns where a warp holds a whole row
constexpr int result_stride = HEAD_DIM + 4;      // of rows in shared memory
constexpr bool tensor_cores = !same_type<scalar_t, float>;
// Keys and values of a tile do not fit into registers beside the results: its second half of the values is loaded
// when its keys have been used, and the next keys only after the values.
constexpr bool in_halves = HEAD_DIM == 256;
constexpr float log2_e = 1.4426950408889634f;

// ---- what to do, and where the data is

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

// ---- softmax in exponents of 2

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
