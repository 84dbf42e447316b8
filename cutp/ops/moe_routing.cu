// Routing of a mixture of experts: from router logits to each token's experts and their weights.
// Specification: moe_routing.py.
//
// A warp routes a token; of every 32 experts a lane has one. What decides is a 64-bit key, the score above the
// complement of the expert's index, so that equal scores go to the lower expert whatever the order of comparisons.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32
#include "device.cuh"

constexpr int warps = 4;
constexpr int most_experts = 512, most_groups = 32;
constexpr int most_of_lane = most_experts / warp_size;

// What all three kernels take. slots is null or has a negative number for tokens that are padding: they get the
// expert -1 and the weight 0 in every slot.
struct Routing {
    const scalar_t* logits;  // [tokens, count]
    const i64* slots;
    int* experts;    // [tokens, top_k]
    float* weights;  // [tokens, top_k]
    int tokens, count, top_k;

    __device__ __forceinline__ int token() const { return blockIdx.x * warps + warp_id(); }
    __device__ __forceinline__ float logit(int expert) const {
        return to_float(load_activation_element(logits + static_cast<i64>(token()) * count + expert));
    }
    // One result a slot: of lane i for slot i.
    __device__ __forceinline__ void store(int expert, float weight) const {
        if (lane_id() >= top_k) return;
        const i64 at = static_cast<i64>(token()) * top_k + lane_id();
        experts[at] = expert;
        weights[at] = weight;
    }
    // Whether this warp has a token to route. Padding is done with here.
    __device__ __forceinline__ bool has_token() const {
        if (token() >= tokens) return false;
        if (!slots || load_activation_element(slots + token()) >= 0) return true;
        store(-1, 0.0f);
        return false;
    }
};

// Greater for greater values, equal for both zeros; 0, below everything, for NaN.
__device__ __forceinline__ u32 ordered(float v) {
    const u32 bits = __float_as_uint(v + 0.0f);
    return v != v ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u64 warp_max(u64 v) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) v = max(v, shuffle_xor(v, distance));
    return v;
}

// The keys of this lane's experts; 0 where there is none, or none any more.
struct Keys {
    u64 of[most_of_lane] = {};

    __device__ __forceinline__ static int expert(int i) { return i * warp_size + lane_id(); }
    __device__ __forceinline__ void set(int i, float score) {
        of[i] = static_cast<u64>(ordered(score)) << 32 | ~static_cast<u32>(expert(i));
    }
    // The best expert is taken out and returned to every lane.
    __device__ __forceinline__ int take(int count) {
        u64 best = 0;
#pragma unroll
        for (int i = 0; i < most_of_lane; i++)
            if (i * warp_size < count) best = max(best, of[i]);
        best = warp_max(best);
#pragma unroll
        for (int i = 0; i < most_of_lane; i++)
            if (of[i] == best) of[i] = 0;
        return static_cast<int>(~static_cast<u32>(best));
    }
    // Lane i receives the i-th best expert; lanes beyond top_k some expert.
    __device__ __forceinline__ int take_best(const Routing& r) {
        int mine = 0;
        for (int slot = 0; slot < r.top_k; slot++) {
            const int best = take(r.count);
            if (lane_id() == slot) mine = best;
        }
        return mine;
    }
};

// visit(i, expert) for each of this lane's experts.
template <class Visit> __device__ __forceinline__ void for_each_expert(const Routing& r, Visit visit) {
#pragma unroll
    for (int i = 0; i < most_of_lane; i++)
        if (Keys::expert(i) < r.count) visit(i, Keys::expert(i));
}

// The sum of the slots' values, the first slot first.
__device__ __forceinline__ float sum_of_slots(float v, int top_k) {
    float sum = 0.0f;
    for (int slot = 0; slot < top_k; slot++) sum += shuffle(v, slot);
    return sum;
}

// ---- the rules

extern "C" __global__ void __launch_bounds__(128)
route_softmax(const scalar_t* logits, const i64* slots, int* experts, float* weights, int tokens, int count, int top_k,
              int renormalize) {
    pdl_wait();
    pdl_launch_dependents();
    const Routing r = {logits, slots, experts, weights, tokens, count, top_k};
    if (!r.has_token()) return;
    Keys keys;
    float values[most_of_lane], greatest = negative_infinity(), total = 0.0f;
    for_each_expert(r, [&](int i, int expert) {
        values[i] = r.logit(expert);
        keys.set(i, values[i]);
        greatest = fmaxf(greatest, values[i]);
    });
    greatest = warp_max(greatest);
    for_each_expert(r, [&](int i, int) { total += expf(values[i] - greatest); });  // of a NaN: a NaN
    total = warp_sum(total);
    const int expert = keys.take_best(r);
    float weight = expf(r.logit(expert) - greatest) / total;
    if (renormalize) weight /= sum_of_slots(weight, top_k);
    r.store(expert, weight);
}

extern "C" __global__ void __launch_bounds__(128)
route_top_k_softmax(const scalar_t* logits, const i64* slots, int* experts, float* weights, int tokens, int count,
                    int top_k) {
    pdl_wait();
    pdl_launch_dependents();
    const Routing r = {logits, slots, experts, weights, tokens, count, top_k};
    if (!r.has_token()) return;
    Keys keys;
    for_each_expert(r, [&](int i, int expert) { keys.set(i, r.logit(expert)); });
    const int expert = keys.take_best(r);
    const float logit = r.logit(expert);
    const float weight = expf(logit - shuffle(logit, 0));
    r.store(expert, weight / sum_of_slots(weight, top_k));
}

// The exponential of a non-positive number only: no overflow at either end.
__device__ __forceinline__ float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x >= 0 ? 1.0f : e) / (1.0f + e);
}

// Lane i receives whether group i is one of the `top_groups` best by the sum of its two greatest scores; equal groups,
// the lower first. scores: this warp's, of all experts, in shared memory.
__device__ __forceinline__ bool is_kept(const float* scores, int size, int groups, int top_groups) {
    float best[2] = {negative_infinity(), negative_infinity()};
    u32 keys[2] = {0, 0};
    if (lane_id() < groups) {
        for (int i = 0; i < size; i++) {
            const float score = scores[lane_id() * size + i];
            const u32 key = ordered(score);
            if (i == 0 || key > keys[0]) {
                best[1] = best[0], keys[1] = keys[0];
                best[0] = score, keys[0] = key;
            } else if (i == 1 || key > keys[1]) {
                best[1] = score, keys[1] = key;
            }
        }
    }
    const u32 own = ordered(best[0] + best[1]);
    int better = 0;
    for (int group = 0; group < groups; group++) {
        const u32 other = shuffle(own, group);
        better += other > own || (other == own && group < lane_id());
    }
    return better < top_groups;
}

// correction_bias [count], or null, has a say in the choice, not in the weights.
extern "C" __global__ void __launch_bounds__(128)
route_group_limited(const scalar_t* logits, const i64* slots, int* experts, float* weights, int tokens, int count,
                    int top_k, const float* correction_bias, int groups, int top_groups, int renormalize,
                    float scaling) {
    __shared__ float scores_of_warp[warps][most_experts];
    pdl_wait();
    pdl_launch_dependents();
    const Routing r = {logits, slots, experts, weights, tokens, count, top_k};
    if (!r.has_token()) return;
    float* scores = scores_of_warp[warp_id()];
    Keys keys;
    for_each_expert(r, [&](int i, int expert) {
        const float score = sigmoid(r.logit(expert)) + (correction_bias ? correction_bias[expert] : 0.0f);
        keys.set(i, score);
        scores[expert] = score;
    });
    if (top_groups < groups) {
        __syncwarp();
        const int size = count / groups;
        const u32 kept = ballot(is_kept(scores, size, groups, top_groups));
        for_each_expert(r, [&](int i, int expert) {
            if (!(kept >> expert / size & 1)) keys.set(i, __int_as_float(0x7fffffff));  // below every number
        });
    }
    const int expert = keys.take_best(r);
    float weight = sigmoid(r.logit(expert));
    if (renormalize) weight /= sum_of_slots(weight, top_k) + 1e-20f;
    r.store(expert, weight * scaling);
}
