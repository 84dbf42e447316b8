// Rows of logits over a shard of the vocabulary: reading them, and pairs of (value, token id) whose maximum does not
// depend on who computes it. What the kernels of sampling_logits.cu, sampling_records.cu, penalties.cu and logprobs.cu
// share.
#pragma once
#include "device.cuh"

constexpr int block_threads = 256;
constexpr int warps = block_threads / warp_size;
constexpr int width = vector_size<float>;  // columns that a thread works on together
constexpr int in_flight = 4;               // groups that a thread loads before it works on them

// ---------------------------------------------------------------------------------------------------------------
// Walking along a row
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool inside(int column, int columns) {
    return static_cast<u32>(column) < static_cast<u32>(columns);
}

// The columns of one 16-byte access.
template <class T> union Group {
    uint4 vector;
    T values[vector_size<T>];
};

// The group from `column` on, where some columns may lie outside the row: `outside` stands for those. Rows may begin
// anywhere: only groups that are aligned and whole are read by one access.
template <class T>
__device__ __forceinline__ void load_group(const T* row, int column, int columns, T outside, Group<T>& group) {
    constexpr int each = vector_size<T>;
    const T* p = row + column;
    if (column >= 0 && column + each <= columns && reinterpret_cast<u64>(p) % 16 == 0) {
        group.vector = load_activation(p);
    } else {
#pragma unroll
        for (int j = 0; j < each; j++)
            group.values[j] = inside(column + j, columns) ? load_activation_element(p + j) : outside;
    }
}

// visit(column, values) for every four columns of a group; values of 16 bits become floats.
template <class T, class Visit>
__device__ __forceinline__ void visit_group(int column, const Group<T>& group, const Visit& visit) {
    if constexpr (vector_size<T> == width) {
        visit(column, group.values);
    } else {
#pragma unroll
        for (int first = 0; first < vector_size<T>; first += width) {
            float four[width];
#pragma unroll
            for (int j = 0; j < width; j++) four[j] = to_float(group.values[first + j]);
            visit(column + first, four);
        }
    }
}

// visit(column, values), four columns at a time, for this block's share of a row's groups; the blocks along x share the
// row. The first group begins at column -shift, which may be before the row, and each where the one before it ends.
template <class T, class Visit>
__device__ __forceinline__ void for_each_group(const T* row, int columns, int shift, T outside, Visit visit) {
    constexpr int each = vector_size<T>;
    const int count = (columns + shift + each - 1) / each;
    const int share = (count + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
    const int end = min(count, share * (static_cast<int>(blockIdx.x) + 1));
    for (int g = share * static_cast<int>(blockIdx.x) + static_cast<int>(threadIdx.x); g < end;
         g += in_flight * block_threads) {
        Group<T> groups[in_flight];
#pragma unroll
        for (int i = 0; i < in_flight; i++)
            if (g + i * block_threads < end)
                load_group(row, (g + i * block_threads) * each - shift, columns, outside, groups[i]);
#pragma unroll
        for (int i = 0; i < in_flight; i++)
            if (g + i * block_threads < end) visit_group((g + i * block_threads) * each - shift, groups[i], visit);
    }
}

template <class T> __device__ __forceinline__ T* row_of(T* matrix, int row, i64 columns) {
    return matrix + row * columns;
}

// ---------------------------------------------------------------------------------------------------------------
// Keys and pairs (sampling_keys.py)
// ---------------------------------------------------------------------------------------------------------------

constexpr u64 no_pair = 0;       // below the pair of any number
constexpr u64 nan_pair = ~0ull;  // above the pair of any number

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }
__device__ __forceinline__ float lowest_float() { return __int_as_float(0xff7fffff); }

__device__ __forceinline__ u32 ordered_key(float v) {
    const int bits = __float_as_int(__fadd_rn(v, 0.0f));  // -0 + 0 is +0
    return static_cast<u32>(bits) ^ (static_cast<u32>(bits >> 31) | 0x80000000u);
}
__device__ __forceinline__ float value_of_key(u32 key) {
    return __uint_as_float(key ^ (key & 0x80000000u ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ u64 pack_pair(float value, u32 id) {
    return value != value ? nan_pair : static_cast<u64>(ordered_key(value)) << 32 | ~id;
}
__device__ __forceinline__ float pair_value(u64 pair) { return value_of_key(static_cast<u32>(pair >> 32)); }
__device__ __forceinline__ i64 pair_id(u64 pair) { return ~static_cast<u32>(pair); }

__device__ __forceinline__ u64 warp_max_pair(u64 v) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) v = max(v, shuffle_xor(v, distance));
    return v;
}

// The maximum over the block, in the first warp. scratch: one element per warp.
__device__ __forceinline__ u64 block_max_pair(u64 v, u64* scratch) {
    v = warp_max_pair(v);
    if (lane_id() == 0) scratch[warp_id()] = v;
    __syncthreads();
    return warp_max_pair(lane_id() < warps ? scratch[lane_id()] : no_pair);
}

// True in all lanes of the first warp of the last of a row's blocks to come here; what the others wrote before they
// came is visible then. The caller has the writes of its block made, or ordered before its first lane's, and the last
// block leaves the ticket at 0 for the next launch. To be called by the first warp only.
__device__ __forceinline__ bool is_last_block(u32* ticket) {
    u32 arrived = 0;
    if (lane_id() == 0) {
        arrived = atomic_add_acq_rel(ticket, 1);
        if (arrived == gridDim.x - 1) *ticket = 0;
    }
    const bool is_last = shuffle(arrived, 0) == gridDim.x - 1;
    __syncwarp();  // what the first lane has acquired is visible to the others
    return is_last;
}

// *out = the greatest pair that any thread of the row's blocks has. parts: one element per block of the row.
__device__ __forceinline__ void finish_row_max(u64 best, u64* parts, u32* ticket, u64* out, u64* scratch) {
    best = block_max_pair(best, scratch);
    if (warp_id() != 0) return;
    if (gridDim.x > 1) {
        if (lane_id() == 0) parts[blockIdx.x] = best;
        if (!is_last_block(ticket)) return;
        best = no_pair;
        for (u32 i = lane_id(); i < gridDim.x; i += warp_size) best = max(best, load_activation_element(parts + i));
        best = warp_max_pair(best);
    }
    if (lane_id() == 0) *out = best;
}
