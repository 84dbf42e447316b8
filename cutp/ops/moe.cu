// The experts' part of a mixture of experts, but for the products: rows sorted by expert, and the sum of each token's
// rows. Specification: moe.py.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32
#include "device.cuh"

constexpr int ids_width = vector_size<int>;

__device__ __forceinline__ int warp_sum(int v) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) v += shuffle_xor(v, distance);
    return v;
}

// Slots of tokens, all of them in one list. A block sorts those of one expert: it counts the slots of lower experts,
// which is where its rows begin, and lists its own. Blocks share nothing, and the order is that of the list.
struct Slots {
    const int* experts;
    int length, first, count;

    // For each of the four slots at 4 * group: the number of its expert among `count` experts from `first` on; `count`
    // for other experts; a larger number beyond the end of the list.
    __device__ __forceinline__ void load(int group, bool valid, u32 (&numbers)[ids_width]) const {
        int ids[ids_width];
        const int at = group * ids_width;
        if (valid && at + ids_width <= length) {
            const uint4 v = load_activation(experts + at);
            ids[0] = v.x, ids[1] = v.y, ids[2] = v.z, ids[3] = v.w;
        } else {
#pragma unroll
            for (int i = 0; i < ids_width; i++)
                ids[i] = valid && at + i < length ? load_activation_element(experts + at + i) : 0;
        }
#pragma unroll
        for (int i = 0; i < ids_width; i++) {
            const u32 number = min(static_cast<u32>(ids[i]) - static_cast<u32>(first), static_cast<u32>(count));
            numbers[i] = valid && at + i < length ? number : ~0u;
        }
    }
};

// experts [tokens, top_k] -> offsets [count + 1], positions [tokens, top_k], tokens: as many as there are rows. Blocks:
// one for each expert, and one for the slots of all others.
extern "C" __global__ void __launch_bounds__(1024)
expert_rows(const int* experts, int* tokens, int* offsets, int* positions, int length, int top_k, int first,
            int count) {
    __shared__ int own_of_warp[32], lower_of_warp[32];
    const int warps = blockDim.x / warp_size;
    const u32 own_number = blockIdx.x;
    const bool others = blockIdx.x == count;
    const Slots slots = {experts, length, first, count};
    // Each warp has a run of groups of four slots.
    const int groups = (length + ids_width - 1) / ids_width, groups_of_warp = (groups + warps - 1) / warps;
    const int begin = warp_id() * groups_of_warp, end = min(begin + groups_of_warp, groups);
    u32 numbers[ids_width];
    pdl_wait();
    pdl_launch_dependents();

    int own = 0, lower = 0;
#pragma unroll 2
    for (int group = begin + lane_id(); group < end; group += warp_size) {
        slots.load(group, true, numbers);
#pragma unroll
        for (int i = 0; i < ids_width; i++) {
            own += numbers[i] == own_number;
            lower += numbers[i] < own_number;
        }
    }
    own = warp_sum(own);
    lower = warp_sum(lower);
    if (lane_id() == 0) own_of_warp[warp_id()] = own, lower_of_warp[warp_id()] = lower;
    __syncthreads();
    int row = 0;
    for (int warp = 0; warp < warps; warp++) row += lower_of_warp[warp];
    if (threadIdx.x == 0) offsets[own_number] = row;
    for (int warp = 0; warp < warp_id(); warp++) row += own_of_warp[warp];

#pragma unroll 2
    for (int group = begin; group < end; group += warp_size) {
        slots.load(group + lane_id(), group + lane_id() < end, numbers);
        int of_lane = row, of_warp = 0;
#pragma unroll
        for (int i = 0; i < ids_width; i++) {
            const u32 lanes = ballot(numbers[i] == own_number);  // with a slot of this expert
            of_lane += __popc(lanes & ((1u << lane_id()) - 1));
            of_warp += __popc(lanes);
        }
#pragma unroll
        for (int i = 0; i < ids_width; i++) {
            if (numbers[i] != own_number) continue;
            const int slot = (group + lane_id()) * ids_width + i;
            positions[slot] = others ? -1 : of_lane;
            if (!others) tokens[of_lane] = slot / top_k;
            of_lane++;
        }
        row += of_warp;
    }
}

constexpr int width = vector_size<scalar_t>;
constexpr int slots_at_once = 4;

// out [tokens, dim] = the sum over slots of weights [tokens, top_k] * y[positions [tokens, top_k]], where those are not
// negative, in the order of the slots. Grid: tokens, blocks of a row.
extern "C" __global__ void __launch_bounds__(256)
combine_experts(const scalar_t* y, const int* positions, const float* weights, scalar_t* out, int top_k, int dim) {
    pdl_wait();
    pdl_launch_dependents();
    const i64 token = blockIdx.x;
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * width;
    if (column >= dim) return;
    float total[width] = {};
    for (int first = 0; first < top_k; first += slots_at_once) {
        int rows[slots_at_once];
        float factors[slots_at_once];
        uint4 vectors[slots_at_once];
#pragma unroll
        for (int i = 0; i < slots_at_once; i++) {
            const i64 slot = token * top_k + min(first + i, top_k - 1);
            rows[i] = first + i < top_k ? load_activation_element(positions + slot) : -1;
            factors[i] = load_activation_element(weights + slot);
        }
#pragma unroll
        for (int i = 0; i < slots_at_once; i++)
            vectors[i] = load_activation_if(rows[i] >= 0, y + static_cast<i64>(rows[i]) * dim + column);
#pragma unroll
        for (int i = 0; i < slots_at_once; i++) {
            float values[width];
            unpack<scalar_t>(vectors[i], values);
#pragma unroll
            for (int e = 0; e < width; e++)
                if (rows[i] >= 0) total[e] = __fadd_rn(total[e], __fmul_rn(factors[i], values[e]));
        }
    }
    store_vector(out + token * dim + column, pack<scalar_t>(total));
}
