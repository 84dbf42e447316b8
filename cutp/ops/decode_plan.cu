// The work list of decode attention, made once a step: which tokens of which request one block attends to.
// Launcher: decode_attention_cuda.py; reader: decode_attention.cu.
//
// `target_splits` are those of one request, or, `together`, of all requests, each of which gets as many of them as it has
// of all visible tokens. Alone, how a request is split depends on how many of its tokens are visible and on nothing else:
// its result does not depend on the requests beside it.
//
// Requests with long splits come first, so that blocks that take tasks from the list there and back (decode_attention.cu)
// get about as many tokens each. That is a matter of time only.
//
// The next kernel may not start before the plan is in memory: the kernels after that start later still, and all of them
// may read the plan before their `pdl_wait`.
//
// archs: sm_80 sm_90a sm_100
#include "device.cuh"

constexpr int warps = 8;
constexpr int tile = 16;  // tokens a warp takes at a time
constexpr int granule = 4 * tile;  // a split is a multiple of what the four warps of a block take at a time
constexpr int max_split = 32 * granule;

// The tokens that a request's query sees, and their splits: [first, last), in pieces of `size` from `start` on.
struct Share {
    int first, last, start, size, splits;
};

// How requests are divided. all_visible: tokens that all requests together see; 0 if each is divided by itself.
struct Division {
    int window, target_splits, all_visible;

    __device__ __forceinline__ int splits(int visible) const {
        if (all_visible == 0) return target_splits;
        return max(static_cast<int>(static_cast<i64>(visible) * target_splits / all_visible), 1);
    }
};

__device__ __forceinline__ int first_visible(int length, int window) { return length > window ? length - window : 0; }

__device__ __forceinline__ Share share_of(int length, const Division& division) {
    Share share;
    share.last = max(length, 0);
    share.first = first_visible(share.last, division.window);
    share.start = share.first / tile * tile;
    const int visible = share.last - share.start, splits = division.splits(visible);
    const int wanted = (visible + splits - 1) / splits;
    share.size = min(max((wanted + granule - 1) / granule, 1) * granule, max_split);
    share.splits = (visible + share.size - 1) / share.size;
    return share;
}

// The sum of `v` over the threads before this one and, in `total`, over all of the block.
__device__ __forceinline__ int sum_before(int v, int* scratch, int& total) {
    int sum = v;
#pragma unroll
    for (int distance = 1; distance < warp_size; distance *= 2) {
        const int other = shuffle(sum, max(lane_id() - distance, 0));
        if (lane_id() >= distance) sum += other;
    }
    if (lane_id() == warp_size - 1) scratch[warp_id()] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < warps; w++) {
        if (w < warp_id()) before += scratch[w];
        total += scratch[w];
    }
    __syncthreads();
    return before + sum - v;
}

// One warp writes the items of one request, beginning at item `offset`.
__device__ __forceinline__ void write_items(const Share& share, int request, int offset, uint4* items, int capacity) {
    for (int split = lane_id(); split < share.splits && offset + split < capacity; split += warp_size) {
        const int begin = share.start + split * share.size;
        const int first = max(begin, share.first), last = min(begin + share.size, share.last);
        store_vector(items + offset + split, make_uint4(request, split | share.splits << 16, first, last));
    }
}

// How many of keys[count] are greater than that of this thread, or equal and before it.
__device__ __forceinline__ int rank_of_thread(const int* keys, int count) {
    const int own = keys[threadIdx.x];
    int rank = 0;
    for (int i = 0; i < count; i++) rank += keys[i] > own || (keys[i] == own && i < static_cast<int>(threadIdx.x));
    return rank;
}

// plan[0].x = the number of items; plan[1 ..] = items (request, split | splits of the request << 16, first token,
// token after the last), those of a request one after the other; of every 256 requests, those with the most tokens in a
// split first. A request of length 0 has none. One block.
extern "C" __global__ void __launch_bounds__(warps * warp_size)
decode_plan(const int* kv_lengths, uint4* plan, int batch, int capacity, int window, int target_splits, int together) {
    __shared__ int scratch[warps];
    __shared__ int keys[warps * warp_size], order[warps * warp_size];  // before and after sorting
    __shared__ int lengths[warps * warp_size], offsets[warps * warp_size];
    pdl_wait();
    Division division{window, target_splits, 0};
    if (together) {
        int visible = 0;
        for (int request = threadIdx.x; request < batch; request += blockDim.x) {
            const int length = max(load_activation_element(kv_lengths + request), 0);
            visible += length - first_visible(length, window) / tile * tile;
        }
        sum_before(visible, scratch, division.all_visible);
    }
    int count = 0;
    for (int base = 0; base < batch; base += blockDim.x) {
        const int requests = min(static_cast<int>(blockDim.x), batch - base);
        const bool has_request = static_cast<int>(threadIdx.x) < requests;
        const int length = has_request ? load_activation_element(kv_lengths + base + threadIdx.x) : 0;
        const Share own = share_of(length, division);
        keys[threadIdx.x] = min(own.size, own.last - own.first);
        __syncthreads();
        if (has_request) {
            const int rank = rank_of_thread(keys, requests);
            order[rank] = base + threadIdx.x;
            lengths[rank] = length;
        }
        __syncthreads();
        const int splits = has_request ? share_of(lengths[threadIdx.x], division).splits : 0;
        int added;
        offsets[threadIdx.x] = count + sum_before(splits, scratch, added);
        count += added;
        __syncthreads();
        for (int i = warp_id(); i < requests; i += warps)
            write_items(share_of(lengths[i], division), order[i], offsets[i], plan + 1, capacity);
        __syncthreads();
    }
    if (threadIdx.x == 0) store_vector(plan, make_uint4(min(count, capacity), 0, 0, 0));
    __threadfence();
    __syncthreads();
    pdl_launch_dependents();
}
