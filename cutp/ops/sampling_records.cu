// Sampling on vocabulary shards, the steps that combine the ranks' records of their logits (sampling_logits.cu).
// Specification: sampling.py, sampling_keys.py, sampling_thresholds.py.
//
// The exchange is not done here: these kernels read [n_ranks, ...] buffers. Every rank computes the same from them.
//
// archs: sm_80 sm_90a sm_100
#include "device.cuh"
#include "sampling_search.cuh"
#include "vocab_rows.cuh"

// ---------------------------------------------------------------------------------------------------------------
// Row maximum
// ---------------------------------------------------------------------------------------------------------------

// Sets the `bins` counts and masses of this row to 0.
__device__ __forceinline__ void clear_histogram(u64* histogram, int row, int bins) {
    u64* p = row_of(histogram, row, 2 * bins);
    for (int i = threadIdx.x; i < bins; i += blockDim.x) store_vector(p + 2 * i, make_uint4(0, 0, 0, 0));
}

enum Status { usable, has_nan, nothing_above_minus_inf };

// From the ranks' pairs [n_ranks][batch]: row_max and tokens (the greedy ones; NaN and -1 where there is no usable
// logit) and status. If `search` is given: begins the search for the row's threshold and clears the histogram of the
// first digit, or, where no search is needed, sets `least`, the least score that survives. Grid: rows.
extern "C" __global__ void __launch_bounds__(block_threads)
combine_argmax(const u64* pairs, int n_ranks, int batch, const float* temperature, const int* top_k,
               const float* top_p, const float* min_score, float* row_max, i64* tokens, int* status, Search* search,
               float* least, u64* histogram) {
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.x;
    u64 best = no_pair;
    for (int rank = 0; rank < n_ranks; rank++)
        best = max(best, load_activation_element(row_of(pairs, rank, batch) + row));
    const float greatest = pair_value(best);  // of no pair at all: a NaN
    const bool ok = greatest > negative_infinity();
    const float t = load_activation_element(temperature + row);
    if (threadIdx.x == 0) {
        row_max[row] = ok ? greatest : not_a_number();
        tokens[row] = ok ? pair_id(best) : -1;
        status[row] = ok || t < 0.0f ? usable : best == nan_pair ? has_nan : nothing_above_minus_inf;
    }
    if (!search) return;
    const bool drawn = ok && t > 0.0f;
    const int k = load_activation_element(top_k + row);
    const float p = load_activation_element(top_p + row);
    const bool searched = drawn && (k > 0 || p < 1.0f);
    if (searched) clear_histogram(histogram, row, most_bins);
    if (threadIdx.x == 0) {
        Search s = {};
        s.measure = !searched ? done : k > 0 ? by_count : by_mass;
        s.with_mass = p < 1.0f;
        search[row] = s;
        // Nothing is at or above a NaN: no token can be drawn before the search has ended.
        const float lowest = fmaxf(load_activation_element(min_score + row), lowest_float());
        least[row] = drawn && !searched ? lowest : not_a_number();
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Thresholds (sampling_thresholds.py)
// ---------------------------------------------------------------------------------------------------------------

// ceil(top_p * mass), at least 1, with top_p as a multiple of 2^-32, rounded up.
__device__ __forceinline__ u64 share_of(float top_p, u64 mass) {
    const u64 share = static_cast<u64>(ceil(static_cast<double>(fmaxf(top_p, 0.0f)) * 4294967296.0));
    const u64 low = share * (mass & 0xffffffffu) + 0xffffffffu;  // the carry rounds up
    return max(share * (mass >> 32) + (low >> 32), 1ull);
}

constexpr int digit_threads = 512;
constexpr int digit_warps = digit_threads / warp_size;

// The sum of v over the threads before this one and *total over all. scratch: one element per warp.
__device__ __forceinline__ u64 exclusive_sum(u64 v, u64* scratch, u64* total) {
    u64 up_to_here = v;
#pragma unroll
    for (int distance = 1; distance < warp_size; distance *= 2) {
        const u64 other = shuffle(up_to_here, lane_id() - distance);
        if (lane_id() >= distance) up_to_here += other;
    }
    if (lane_id() == warp_size - 1) scratch[warp_id()] = up_to_here;
    __syncthreads();
    u64 before = up_to_here - v;
    *total = 0;
#pragma unroll
    for (int i = 0; i < digit_warps; i++) {
        if (i < warp_id()) before += scratch[i];
        *total += scratch[i];
    }
    __syncthreads();
    return before;
}

// The digit at which a row's measure, added up from the greatest digit down, reaches its target.
struct Digit {
    Measures above, reached;  // of the greater digits, and with this one
    u64 target;
    u32 digit;
    u32 found;
};

// Searches the row's histograms [n_ranks][batch][count, mass][bins], summed over ranks. target_of(totals) gives the
// target. All threads of the block take part and receive the digit.
template <class TargetOf>
__device__ __forceinline__ const Digit& find_digit(const u64* histograms, int n_ranks, int batch, int bins,
                                                   Measure measure, Measures above, TargetOf target_of, u64* scratch,
                                                   Digit* result) {
    constexpr int most = most_bins / digit_threads;
    const int each = bins / digit_threads;  // this thread's bins, neighbours from the greatest digit down
    u64 counts[most], masses[most];
    Measures own = {0, 0};
#pragma unroll
    for (int i = 0; i < most; i++) {
        counts[i] = masses[i] = 0;
        if (i >= each) continue;
        const int bin = bins - 1 - (static_cast<int>(threadIdx.x) * each + i);
        for (int rank = 0; rank < n_ranks; rank++) {
            const u64* row = histograms + (static_cast<i64>(rank) * batch + blockIdx.x) * 2 * bins;
            counts[i] += load_activation_element(row + bin);
            masses[i] += load_activation_element(row + bins + bin);
        }
        own.count += counts[i];
        own.mass += masses[i];
    }
    if (threadIdx.x == 0) result->found = 0;
    Measures total;
    Measures at = {exclusive_sum(own.count, scratch, &total.count), exclusive_sum(own.mass, scratch, &total.mass)};
    at = {at.count + above.count, at.mass + above.mass};
    const u64 target = target_of(total);
    const bool mass = measure == by_mass;
    const u64 begin = mass ? at.mass : at.count, length = mass ? own.mass : own.count;
    if (begin < target && target <= begin + length) {
        bool passed = false;
#pragma unroll
        for (int i = 0; i < most; i++) {
            const Measures reached = {at.count + counts[i], at.mass + masses[i]};
            if (!passed && (mass ? reached.mass : reached.count) >= target) {
                *result = {at, reached, target, static_cast<u32>(bins - 1 - (threadIdx.x * each + i)), 1};
                passed = true;
            }
            at = reached;
        }
    }
    __syncthreads();
    return *result;
}

// Finds digit `level` of the rows that search it from the ranks' histograms [n_ranks][batch][count, mass][bins], and
// clears next[batch][count, mass][next_bins], this rank's histograms of the next pass, where the search goes on.
// The last digit of top-k is followed by the first digit of top-p, which is in the first pass's histograms `first`,
// [n_ranks][batch][count, mass][2048]: top-p counts the mass that top-k left. The last digit of all gives `least`.
extern "C" __global__ void __launch_bounds__(digit_threads)
find_digits(const u64* histograms, const u64* first, int n_ranks, int batch, int level, const int* top_k,
            const float* top_p, const float* min_score, Search* search, float* least, u64* next, int next_bins) {
    __shared__ u64 scratch[digit_warps];
    __shared__ Digit results[2];
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.x;
    Search s = load_search(search + row);
    if (s.measure == done || s.level != level) return;
    const int k = load_activation_element(top_k + row);
    const float p = load_activation_element(top_p + row);
    const Digit& d = find_digit(histograms, n_ranks, batch, 1 << digit_bits(level), static_cast<Measure>(s.measure),
                                s.above, [&](Measures total) {
        if (level) return s.target;
        return s.measure == by_count ? min(static_cast<u64>(k), total.count) : share_of(p, total.mass);
    }, scratch, &results[0]);
    if (!d.found) return;  // the histograms are not those of the row: `least` stays NaN
    s.prefix = s.prefix << digit_bits(level) | d.digit;
    s.above = d.above;
    s.target = d.target;
    s.level = level + 1;
    if (level == 2 && s.measure == by_count && p < 1.0f) {
        const Digit& top = find_digit(first, n_ranks, batch, most_bins, by_mass, Measures{0, 0},
                                      [&](Measures) { return share_of(p, d.reached.mass); }, scratch, &results[1]);
        if (!top.found) return;
        s = {top.above, top.target, top.digit, 1, by_mass, 1};
    } else if (level == 2) {
        s.measure = done;
    }
    if (s.measure != done && next) clear_histogram(next, row, next_bins);
    if (threadIdx.x != 0) return;
    if (s.measure == done) {
        const float lowest = fmaxf(load_activation_element(min_score + row), lowest_float());
        least[row] = fmaxf(lowest, value_of_key(s.prefix));
    }
    search[row] = s;
}

// ---------------------------------------------------------------------------------------------------------------
// Draw
// ---------------------------------------------------------------------------------------------------------------

// tokens[row] = the token of the greatest of the ranks' pairs [n_ranks][batch], -1 if there is none. Greedy rows keep
// the token they have.
extern "C" __global__ void __launch_bounds__(block_threads)
combine_draw(const u64* pairs, int n_ranks, int batch, const float* temperature, i64* tokens) {
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.x * block_threads + threadIdx.x;
    if (row >= batch || !(load_activation_element(temperature + row) > 0.0f)) return;
    u64 best = no_pair;
    for (int rank = 0; rank < n_ranks; rank++)
        best = max(best, load_activation_element(row_of(pairs, rank, batch) + row));
    tokens[row] = best == no_pair ? -1 : pair_id(best);
}
