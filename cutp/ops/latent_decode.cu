// Attention of one new token per request over the paged latent cache, in its absorbed form: all heads read the same
// latents, as keys with all their channels and as values with the first of them. Specification: latent_attention.py.
//
// A task is one split of one request (decode_plan.cu) for HEADS of its heads. A fixed number of blocks stride over all
// tasks. Where a request has several splits, each leaves a partial result, and a second kernel adds them up in order.
// So every sum has an order that depends on the request's own length only.
//
// Blocks of keys pass through shared memory, where they serve as keys and as values of all heads. Warps share 16 heads
// a row tile: each multiplies a part of the keys and, with everybody's weights, a part of the columns of the values.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16 HEADS=16,32,64
#include "device.cuh"

constexpr int channels = 576, value_dim = 512;
constexpr int warps = HEADS == 64 ? 8 : 4;
constexpr int threads = warps * warp_size;
constexpr int blocks_per_sm = HEADS == 64 ? 1 : 2;
constexpr int row_tiles = HEADS / 16, sharers = warps / row_tiles;  // warps of one row tile
constexpr int key_block = 32;
constexpr int key_parts = key_block / sharers / 8;             // of 8 keys that a warp multiplies
constexpr int value_parts = value_dim / sharers / 8;           // of 8 columns of the values that a warp has
constexpr int row_vectors = channels / vector_size<scalar_t>;  // 16 bytes each
constexpr int row_bytes = row_vectors * 16;
constexpr int weight_bytes = key_block * 2 + 16;  // of a row of weights: rows at one column lie in different banks
constexpr int stage_bytes = key_block * row_bytes;
constexpr int group_keys = 16;  // keys are looked up by groups, which never straddle a page
constexpr int max_groups = 128;  // of the longest split, decode_plan.cu
static_assert(key_parts >= 1 && value_parts % 2 == 0 && row_vectors % 8 == 0, "whole parts");

// What a launch is about; the names are those of the kernels' parameters.
struct Arguments {
    const scalar_t *q, *pages;
    const int* lookup_table;
    const i64* table_rows;
    const uint4* plan;
    scalar_t* out;
    float* partials;
    int capacity, max_pages, page_size, heads;
    float exponent_factor;

    __device__ __forceinline__ int head_groups() const { return (heads + HEADS - 1) / HEADS; }
    // Partial results: [capacity, heads, value_dim] values, then as many pairs of peak and total.
    __device__ __forceinline__ float* partial_values(int item, int head) const {
        return partials + (static_cast<i64>(item) * heads + head) * value_dim;
    }
    __device__ __forceinline__ float2* partial_stats(int item, int head) const {
        return reinterpret_cast<float2*>(partial_values(capacity, 0)) + static_cast<i64>(item) * heads + head;
    }
    __device__ __forceinline__ scalar_t* result(int request, int head) const {
        return out + (static_cast<i64>(request) * heads + head) * value_dim;
    }
};

struct Task {
    int item, request, splits, first, last, first_head;

    __device__ __forceinline__ Task(const Arguments& a, int index) {
        item = index / a.head_groups();
        const uint4 v = load_activation(a.plan + 1 + item);
        request = v.x, splits = v.y >> 16, first = v.z, last = v.w;
        first_head = index % a.head_groups() * HEADS;
    }
};

struct Shared {
    int row_of_group[max_groups];  // where 16 keys begin in the pool, counted in keys
    float peaks[warps][16], totals[warps][16];
};

// Where a vector of a row of queries or keys is: neither two rows with four neighbouring vectors nor eight rows with
// one are in the same banks.
__device__ __forceinline__ u32 place_of(int row, int vector) {
    return row * row_bytes + (vector ^ ((row & 1) << 2 | (row >> 1 & 3))) * 16;
}

// ---- loads; zeros arrive for heads and keys that do not exist, because a weight of zero does not cancel a NaN

__device__ __forceinline__ void load_queries(const Arguments& a, const Task& task, u32 queries) {
    const scalar_t* q = a.q + (static_cast<i64>(task.request) * a.heads + task.first_head) * channels;
#pragma unroll 2
    for (int i = threadIdx.x; i < HEADS * row_vectors; i += threads) {
        const int row = i / row_vectors, vector = i % row_vectors;
        cp_async_16(queries + place_of(row, vector), q + i * vector_size<scalar_t>, task.first_head + row < a.heads);
    }
}

__device__ __forceinline__ void look_up_groups(const Arguments& a, const Task& task, Shared& shared) {
    const i64 row = a.table_rows == nullptr ? task.request : load_activation_element(a.table_rows + task.request);
    const int* pages = a.lookup_table + row * a.max_pages;
    for (int i = threadIdx.x; i * group_keys < task.last - task.first; i += threads) {
        const int key = task.first + i * group_keys, page = load_activation_element(pages + key / a.page_size);
        shared.row_of_group[i] = page * a.page_size + key % a.page_size;
    }
}

// Keys `at` .. of the split.
__device__ __forceinline__ void load_keys(const Arguments& a, const Task& task, const Shared& shared, u32 stage,
                                          int at) {
    const int keys = task.last - task.first - at;
#pragma unroll 2
    for (int i = threadIdx.x; i < key_block * row_vectors; i += threads) {
        const int row = i / row_vectors, vector = i % row_vectors;
        const bool exists = row < keys;
        const i64 pool_row = exists ? shared.row_of_group[(at + row) / group_keys] + row % group_keys : 0;
        cp_async_16(stage + place_of(row, vector), a.pages + pool_row * channels + vector * vector_size<scalar_t>,
                    exists);
    }
}

// ---- what a warp computes: of 16 heads, a lane has heads lane / 4 and lane / 4 + 8, of 8 keys or columns two

struct Rows {
    float values[value_parts][4] = {};
    float scores[key_parts][4];
    float peaks[2] = {negative_infinity(), negative_infinity()};
    float totals[2] = {0.0f, 0.0f};  // of this warp's keys

    static __device__ __forceinline__ int tile() { return warp_id() / sharers; }
    static __device__ __forceinline__ int sharer() { return warp_id() % sharers; }
    static __device__ __forceinline__ int row_in_tile(int half) { return half * 8 + lane_id() / 4; }

    // A permutation of the channels that both operands share leaves a product as it is: a lane's 16 bytes are operands
    // of two tensor core instructions as they are.
    __device__ __forceinline__ void multiply_keys(u32 queries, u32 stage) {
        const u32 own = place_of(lane_id() / 4, lane_id() % 4);
        queries += tile() * 16 * row_bytes;
        stage += sharer() * key_parts * 8 * row_bytes;
#pragma unroll
        for (int j = 0; j < key_parts; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) scores[j][e] = 0.0f;
#pragma unroll 3
        for (int k = 0; k < row_vectors / 8; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 at = (own ^ half * 64) + k * 128;
                const uint4 low = load_shared(queries + at), high = load_shared(queries + at + 8 * row_bytes);
#pragma unroll
                for (int j = 0; j < key_parts; j++) {
                    const uint4 b = load_shared(stage + at + j * 8 * row_bytes);
                    mma_m16n8k16<scalar_t>(scores[j], low.x, high.x, low.y, high.y, b.x, b.y);
                    mma_m16n8k16<scalar_t>(scores[j], low.z, high.z, low.w, high.w, b.z, b.w);
                }
            }
        }
    }

    // -inf for keys beyond the split's `keys`; then the greatest score of this warp's keys to the other warps.
    __device__ __forceinline__ void mask_and_publish(int keys, Shared& shared) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float greatest = negative_infinity();
#pragma unroll
            for (int j = 0; j < key_parts; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& score = scores[j][2 * half + e];
                    if ((sharer() * key_parts + j) * 8 + lane_id() % 4 * 2 + e >= keys) score = negative_infinity();
                    greatest = fmaxf(greatest, score);
                }
            greatest = fmaxf(greatest, shuffle_xor(greatest, 1));
            greatest = fmaxf(greatest, shuffle_xor(greatest, 2));
            if (lane_id() % 4 == 0) shared.peaks[warp_id()][row_in_tile(half)] = greatest;
        }
    }

    // Scores become weights, for all warps of the row tile to read. Peaks are exponents of 2.
    __device__ __forceinline__ void weigh(const Arguments& a, const Shared& shared, unsigned char* weights) {
        float factors[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float peak = peaks[half];
#pragma unroll
            for (int w = 0; w < sharers; w++)
                peak = fmaxf(peak, shared.peaks[tile() * sharers + w][row_in_tile(half)] * a.exponent_factor);
            // Of scores that are all -inf every weight is 0, not the NaN that -inf - -inf gives.
            const float base = peak == negative_infinity() ? 0.0f : peak;
            factors[half] = exp2_approx(peaks[half] - base);
            peaks[half] = peak;
            float sum = 0.0f;
            unsigned char* row = weights + (tile() * 16 + row_in_tile(half)) * weight_bytes;
#pragma unroll
            for (int j = 0; j < key_parts; j++) {
                const float low = exp2_approx(fmaf(scores[j][2 * half], a.exponent_factor, -base));
                const float high = exp2_approx(fmaf(scores[j][2 * half + 1], a.exponent_factor, -base));
                sum += low + high;
                const int pair = (sharer() * key_parts + j) * 4 + lane_id() % 4;
                reinterpret_cast<u32*>(row)[pair] = pack2<scalar_t>(low, high);
            }
            totals[half] = fmaf(totals[half], factors[half], sum);
        }
        // Peaks seldom rise after the first blocks.
        if (ballot(factors[0] != 1.0f || factors[1] != 1.0f) == 0) return;
#pragma unroll
        for (int j = 0; j < value_parts; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) values[j][e] *= factors[e / 2];
    }

    __device__ __forceinline__ void multiply_values(u32 weights, u32 stage) {
        weights += (tile() * 16 + lane_id() % 16) * weight_bytes + lane_id() / 16 * 16;
        const int first_vector = sharer() * value_parts;
#pragma unroll
        for (int k = 0; k < key_block / 16; k++) {
            u32 w[4];
            ldmatrix_x4(w, weights + k * 32);
#pragma unroll
            for (int j = 0; j < value_parts; j += 2) {
                u32 b[4];
                ldmatrix_x4_trans(b, stage + place_of(k * 16 + lane_id() % 16, first_vector + j + lane_id() / 16));
                mma_m16n8k16<scalar_t>(values[j], w[0], w[1], w[2], w[3], b[0], b[1]);
                mma_m16n8k16<scalar_t>(values[j + 1], w[0], w[1], w[2], w[3], b[2], b[3]);
            }
        }
    }

    __device__ __forceinline__ void publish_totals(Shared& shared) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            totals[half] += shuffle_xor(totals[half], 1);
            totals[half] += shuffle_xor(totals[half], 2);
            if (lane_id() % 4 == 0) shared.totals[warp_id()][row_in_tile(half)] = totals[half];
        }
    }

    __device__ __forceinline__ void store(const Arguments& a, const Task& task, const Shared& shared) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int head = task.first_head + tile() * 16 + row_in_tile(half);
            if (head >= a.heads) continue;
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < sharers; w++) total += shared.totals[tile() * sharers + w][row_in_tile(half)];
            const int column = sharer() * value_parts * 8 + lane_id() % 4 * 2;
            if (task.splits == 1) {
                const float factor = 1.0f / total;
                u32* to = reinterpret_cast<u32*>(a.result(task.request, head) + column);
#pragma unroll
                for (int j = 0; j < value_parts; j++)
                    to[j * 4] = pack2<scalar_t>(values[j][2 * half] * factor, values[j][2 * half + 1] * factor);
            } else {
                if (sharer() == 0 && lane_id() % 4 == 0)
                    *a.partial_stats(task.item, head) = make_float2(peaks[half], total);
                float* to = a.partial_values(task.item, head) + column;
#pragma unroll
                for (int j = 0; j < value_parts; j++)
                    *reinterpret_cast<float2*>(to + j * 8) =
                        make_float2(values[j][2 * half], values[j][2 * half + 1]);
            }
        }
    }
};

// Requests of no tokens, which pad a batch, get zeros.
__device__ __forceinline__ void clear_empty_requests(const Arguments& a, const int* kv_lengths, int batch) {
    for (int request = blockIdx.x; request < batch; request += gridDim.x) {
        if (load_activation_element(kv_lengths + request) > 0) continue;
        for (int i = threadIdx.x; i < a.heads * value_dim / vector_size<scalar_t>; i += threads)
            store_vector(a.result(request, 0) + i * vector_size<scalar_t>, make_uint4(0, 0, 0, 0));
    }
}

__device__ __forceinline__ int tasks_of(const Arguments& a) {
    return load_activation_element(reinterpret_cast<const int*>(a.plan)) * a.head_groups();
}

// out[b] [heads, 512] = attention of q[b] [heads, 576] over the tokens that the plan gives to request b; results of
// requests with several splits go to `partials` instead. pages: [P, page_size, 576]; lookup_table: [.., max_pages], of
// which request b has row table_rows[b], or b where that is null;
// plan: 1 + capacity items. A score times exponent_factor is an exponent of 2.
extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
latent_decode(const scalar_t* q, const scalar_t* pages, const int* lookup_table, const i64* table_rows,
              const int* kv_lengths,
              const uint4* plan, scalar_t* out, float* partials, int batch, int capacity, int max_pages, int page_size,
              int heads, float exponent_factor) {
    __shared__ Shared shared;
    const Arguments a = {q,        pages,     lookup_table, table_rows, plan,           out,
                         partials, capacity,  max_pages,    page_size,  heads, exponent_factor};
    unsigned char* const memory = dynamic_shared();
    unsigned char* const weights = memory + HEADS * row_bytes + 2 * stage_bytes;
    const u32 queries = shared_address(memory), stages = queries + HEADS * row_bytes;
    pdl_wait();
    clear_empty_requests(a, kv_lengths, batch);
    const int tasks = tasks_of(a);
    // There and back, as in decode_attention.cu. mirror: the sum of a task's number and the next one's.
    for (int index = blockIdx.x, mirror = 2 * gridDim.x - 1; index < tasks;
         index = mirror - index, mirror += 2 * gridDim.x) {
        const Task task(a, index);
        const int length = task.last - task.first;
        // Of the task before, a warp may still be reading the totals. All else has been read.
        load_queries(a, task, queries);
        look_up_groups(a, task, shared);
        __syncthreads();
        load_keys(a, task, shared, stages, 0);
        cp_async_commit();
        Rows rows;
        u32 stage = 0;
#pragma unroll 1
        for (int at = 0; at < length; at += key_block) {
            cp_async_wait<0>();
            __syncthreads();  // this block of keys is there, and the one before is done with
            const u32 keys = stages + stage;
            stage = stage_bytes - stage;
            if (at + key_block < length) {
                load_keys(a, task, shared, stages + stage, at + key_block);
                cp_async_commit();
            }
            rows.multiply_keys(queries, keys);
            rows.mask_and_publish(length - at, shared);
            __syncthreads();
            rows.weigh(a, shared, weights);
            __syncthreads();
            rows.multiply_values(shared_address(weights), keys);
        }
        rows.publish_totals(shared);
        __syncthreads();
        rows.store(a, task, shared);
    }
    pdl_launch_dependents();
}

// ---- requests with several splits. A warp has the row of one head: a lane has columns 128i + 4 lane .. + 3

constexpr int lane_vectors = value_dim / (4 * warp_size);
constexpr int loads_ahead = 2;  // partial results whose loads are under way together

__device__ __forceinline__ float weight_below(float v, float peak) {
    return exp2_approx(v - (peak == negative_infinity() ? 0.0f : peak));
}

__device__ __forceinline__ void merge(const Arguments& a, int item, int splits, int request, int head) {
    float peak = negative_infinity(), total = 0.0f, values[lane_vectors][4] = {};
    for (int split = lane_id(); split < splits; split += warp_size)
        peak = fmaxf(peak, load_activation_element(&a.partial_stats(item + split, head)->x));
    peak = warp_max(peak);
    for (int first = 0; first < splits; first += loads_ahead) {
        float2 stats[loads_ahead];
        uint4 loaded[loads_ahead][lane_vectors];
#pragma unroll
        for (int s = 0; s < loads_ahead; s++) {
            const bool exists = first + s < splits;
            stats[s] = load_activation_element(a.partial_stats(item + min(first + s, splits - 1), head));
            if (!exists) stats[s] = make_float2(negative_infinity(), 0.0f);
#pragma unroll
            for (int i = 0; i < lane_vectors; i++)
                loaded[s][i] = load_activation_if(
                    exists, a.partial_values(item + first + s, head) + (i * warp_size + lane_id()) * 4);
        }
#pragma unroll
        for (int s = 0; s < loads_ahead; s++) {
            const float weight = weight_below(stats[s].x, peak);
            total = fmaf(weight, stats[s].y, total);
#pragma unroll
            for (int i = 0; i < lane_vectors; i++) {
                float v[4];
                unpack<float>(loaded[s][i], v);
#pragma unroll
                for (int e = 0; e < 4; e++) values[i][e] = fmaf(weight, v[e], values[i][e]);
            }
        }
    }
    const float factor = 1.0f / total;
#pragma unroll
    for (int i = 0; i < lane_vectors; i++)
        *reinterpret_cast<uint2*>(a.result(request, head) + (i * warp_size + lane_id()) * 4) =
            make_uint2(pack2<scalar_t>(values[i][0] * factor, values[i][1] * factor),
                       pack2<scalar_t>(values[i][2] * factor, values[i][3] * factor));
}

// Warps stride over the heads of all items; the first split of a request stands for all of them.
extern "C" __global__ void __launch_bounds__(256)
latent_merge(const uint4* plan, scalar_t* out, float* partials, int capacity, int heads) {
    const Arguments a = {nullptr, nullptr, nullptr, nullptr, plan, out, partials, capacity, 0, 0, heads, 0.0f};
    pdl_wait();
    const int items = load_activation_element(reinterpret_cast<const int*>(plan)), blocks_of_item = (heads + 7) / 8;
    for (int index = blockIdx.x; index < items * blocks_of_item; index += gridDim.x) {
        const uint4 v = load_activation(plan + 1 + index / blocks_of_item);
        const int split = v.y & 0xffff, splits = v.y >> 16, head = index % blocks_of_item * 8 + warp_id();
        if (split == 0 && splits > 1 && head < heads) merge(a, index / blocks_of_item, splits, v.x, head);
    }
    pdl_launch_dependents();
}
