// Merging what the warps of decode_attention.cu, then the blocks that have splits of the same request, came to. A warp
// holds the row of one head: a lane has dims 128i + 4 lane .. + 3.
#pragma once

constexpr int fan_in = 32;  // partial results merged at once, one a lane

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
