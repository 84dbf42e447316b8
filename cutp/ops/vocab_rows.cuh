// Rows of logits over a shard of the vocabulary: reading them, and pairs of (value, token id) whose maximum does not
// depend on who computes it. What the kernels of sampling.cu, penalties.cu and logprobs.cu share.
#pragma once
#include "device.cuh"

constexpr int block_threads = 256;
constexpr int warps = block_threads / warp_size;
constexpr int width = vector_size<float>;  // logits of one 16-byte access: a group
constexpr int in_flight = 4;               // groups that a thread loads before it works on them

// ---------------------------------------------------------------------------------------------------------------
// Walking along a row
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool inside(int column, int columns) {
    return static_cast<u32>(column) < static_cast<u32>(columns);
}

// Columns column .. column + 3, some of which may lie outside the row: `outside` stands for those. Rows may begin
// anywhere: only groups that are aligned and whole are read by one access.
template <class T>
__device__ __forceinline__ void load_group(const T* row, int column, int columns, T outside, T (&values)[width]) {
    const T* p = row + column;
    if (column >= 0 && column + width <= columns && reinterpret_cast<u64>(p) % 16 == 0) {
        union { uint4 vector; T elements[width]; } v;
        v.vector = load_activation(p);
#pragma unroll
        for (int j = 0; j < width; j++) values[j] = v.elements[j];
    } else {
#pragma unroll
        for (int j = 0; j < width; j++)
            values[j] = inside(column + j, columns) ? load_activation_element(p + j) : outside;
    }
}

// visit(column, values) for this block's share of a row's groups; the blocks along x share the row. Group g begins at
// column g * 4 - shift, so that the first one may begin before the row.
template <class T, class Visit>
__device__ __forceinline__ void for_each_group(const T* row, int columns, int shift, T outside, Visit visit) {
    const int groups = (columns + shift + width - 1) / width;
    const int share = (groups + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
    const int end = min(groups, share * (static_cast<int>(blockIdx.x) + 1));
    for (int g = share * static_cast<int>(blockIdx.x) + static_cast<int>(threadIdx.x); g < end;
         g += in_flight * block_threads) {
        T values[in_flight][width];
#pragma unroll
        for (int i = 0; i < in_flight; i++)
            if (g + i * block_threads < end)
                load_group(row, (g + i * block_threads) * width - shift, columns, outside, values[i]);
#pragma unroll
        for (int i = 0; i < in_flight; i++)
            if (g + i * block_threads < end) visit((g + i * block_threads) * width - shift, values[i]);
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
