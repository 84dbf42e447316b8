// Attention of one new token per request over the paged key-value cache. Specification: attention.py.
//
// A task is one split of one request (decode_plan.cu) for one key-value head and up to 8 * HEAD_TILES of the query
// heads that share it. A fixed number of blocks share all tasks out, the first to the first block and on to the last
// block, then back to the first one, and so on. The four warps of a block take tiles of 16 tokens in turn, merge their
// results and, where the request has several splits, leave a partial result; whoever comes last merges the partial
// results in the order of the splits. So every sum has an order that depends on the request's splits only.
//
// The loads of a tile's keys (values) start as soon as those of the tile before are used up, also across tasks.
//
// With ROTARY the queries come from the projection and are turned on their way; the warp that has a request's newest
// token turns its key as well, uses it and the value at once, and leaves both in the cache. All other keys and values
// are older than the step, so that their loads need not wait for the kernel before. The same bits as rotary_kv_write
// (rotary.cu) and then this kernel without ROTARY.
//
// The lengths and the lookup table are there before decode_plan.cu starts, which lets no kernel start before the plan is
// there as well: all three are read before pdl_wait.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16 HEAD_DIM=64,80,96,128 HEAD_TILES=1,2
// variants: DTYPE=BF16,F16,F32 HEAD_DIM=256 HEAD_TILES=1
// variants: DTYPE=F32 HEAD_DIM=64,80,96,128 HEAD_TILES=1
// variants: DTYPE=BF16,F16 HEAD_DIM=64,128 HEAD_TILES=1,2 ROTARY
// variants: DTYPE=F32 HEAD_DIM=64,128 HEAD_TILES=1 ROTARY
#include "device.cuh"
#include "rotary.cuh"
#include "decode_task.cuh"
#include "decode_tensor_core.cuh"
#include "decode_float.cuh"
#include "decode_merge.cuh"

// A multiprocessor has room for two blocks of each variant and for no third: else those that are free first get three,
// others one, and the work takes longer (NOTES.md). Where two blocks leave registers for a third they take some more, but
// few: there is to be room for a block of stream_gemm.cu beside them.
constexpr int blocks_per_sm = 2;
constexpr int spare_registers = !tensor_cores         ? 0
                                : HEAD_DIM == 64      ? (HEAD_TILES == 1 ? 34 : 12)
                                : HEAD_TILES == 2     ? 0
                                : HEAD_DIM <= 96      ? 6
                                : HEAD_DIM == 128     ? (rotates ? 0 : 2)
                                                      : 0;

template <class T> struct AttentionOf { typedef TensorCoreAttention<T> type; };
template <> struct AttentionOf<float> { typedef FloatAttention type; };
typedef AttentionOf<scalar_t>::type Attention;

// Brings the results of the four warps together. Each warp goes on with heads of its own.
template <int in_flight>
__device__ __forceinline__ void finish(const Arguments& a, const Task& task, const Attention& attention) {
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
    Attention attention;
    SpareRegisters<spare_registers> spare;
    spare.begin();
    pdl_launch_dependents();
    int mirror = 2 * static_cast<int>(gridDim.x) - 1;  // the sum of this task's number and the next one's
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
        const int next_index = mirror - task.index;
        mirror += 2 * static_cast<int>(gridDim.x);
        const bool is_final = next_index >= tasks;
        const uint4 next_item = load_item(a, next_index);
        attention.begin(a, task, at);
        const Task next = is_final ? task : make_task(a, next_index, next_item);
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
        if (is_final) {
            spare.end(batch < 0, out);
            return finish<in_halves ? 32 : 64>(a, task, attention);
        }
        finish<32>(a, task, attention);  // the next keys and values are in registers
        task = next;
    }
}
