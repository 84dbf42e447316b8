// Sampling on vocabulary shards: row maximum, exact top-k / top-p / min-p, Gumbel draw.
// Specification: sampling.py, sampling_keys.py, sampling_thresholds.py, philox.py.
//
// Each step leaves a small record per row. Ranks exchange the records, which is not done here: the kernels that
// combine them read [n_ranks, ...] buffers. Records are integers wherever that is possible: the blocks of a row and
// the ranks may then combine them in any order, and the choice of a token does not depend on the batch, the grid or
// the sharding. What must come out the same as in NumPy, bit for bit, uses the operations __fmul_rn, __fadd_rn, ...,
// which the compiler never fuses.
//
// archs: sm_80 sm_90a sm_100
#include "device.cuh"
#include "vocab_rows.cuh"

// ---------------------------------------------------------------------------------------------------------------
// Scores and their masses (sampling.py, sampling_thresholds.py)
// ---------------------------------------------------------------------------------------------------------------

// (logit - row maximum) / temperature; the maximum is a number above -inf.
__device__ __forceinline__ float score(float logit, float row_max, float temperature) {
    const float z = __fsub_rn(logit, row_max);
    return z != z ? 0.0f : temperature == 1.0f ? z : __fdiv_rn(z, temperature);  // NaN is inf - inf here
}

// floor(exp(z) * 2^40) for z <= 0 by the operations of sampling_thresholds._split_masses: 2^n times a series for 2^f.
__device__ __forceinline__ u64 integer_mass(float z) {
    const float power = __fmul_rn(fmaxf(z, -44.0f), 1.44269504f);
    const float n = rintf(power);
    const float f = __fsub_rn(power, n);
    float sum = 1.54035297e-4f;
    sum = __fadd_rn(__fmul_rn(sum, f), 1.33335579e-3f);
    sum = __fadd_rn(__fmul_rn(sum, f), 9.61812865e-3f);
    sum = __fadd_rn(__fmul_rn(sum, f), 5.55041097e-2f);
    sum = __fadd_rn(__fmul_rn(sum, f), 2.40226507e-1f);
    sum = __fadd_rn(__fmul_rn(sum, f), 6.93147182e-1f);
    sum = __fadd_rn(__fmul_rn(sum, f), 1.0f);
    // sum is mantissa * 2^(exponent - 150): the rest is a shift.
    const u32 bits = __float_as_uint(sum);
    const u64 mantissa = (bits & 0x007fffffu) | 0x00800000u;
    const int shift = static_cast<int>(bits >> 23) - 150 + static_cast<int>(n) + 40;
    return shift >= 0 ? mantissa << shift : mantissa >> -shift;
}

// ceil(top_p * mass), at least 1, with top_p as a multiple of 2^-32, rounded up.
__device__ __forceinline__ u64 share_of(float top_p, u64 mass) {
    const u64 share = static_cast<u64>(ceil(static_cast<double>(fmaxf(top_p, 0.0f)) * 4294967296.0));
    const u64 low = share * (mass & 0xffffffffu) + 0xffffffffu;  // the carry rounds up
    return max(share * (mass >> 32) + (low >> 32), 1ull);
}

// ---------------------------------------------------------------------------------------------------------------
// Row maximum
// ---------------------------------------------------------------------------------------------------------------

// pairs[row] = the greatest logit and the lowest token id that has it; nan_pair if the row has a NaN, no_pair if it has
// no columns or its temperature is negative, which marks rows that are not in use. Grid: blocks of a row, rows.
// parts: [rows][blocks of a row]. tickets: [rows], zeros.
extern "C" __global__ void __launch_bounds__(block_threads)
row_argmax(const float* logits, const float* temperature, u64* parts, u32* tickets, u64* pairs, int columns,
           i64 vocab_start) {
    __shared__ u64 scratch[warps];
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.y;
    u64 best = no_pair;
    if (!(load_activation_element(temperature + row) < 0.0f))
        for_each_group(row_of(logits, row, columns), columns, 0, 0.0f, [&](int column, const float (&x)[width]) {
#pragma unroll
            for (int j = 0; j < width; j++)
                if (inside(column + j, columns))
                    best = max(best, pack_pair(x[j], static_cast<u32>(vocab_start + column + j)));
        });
    finish_row_max(best, row_of(parts, row, gridDim.x), tickets + row, pairs + row, scratch);
}

// What is known of a row's threshold while the digits of its key are being searched, from the highest one on.
enum Measure : u32 { done, by_count, by_mass };
struct Measures {
    u64 count, mass;
};
struct Search {
    Measures above;  // of the tokens whose key is greater than `prefix` with any further digits
    u64 target;      // the tokens at or above the threshold have at least this count, or mass
    u32 prefix;      // the digits found
    u32 level;       // how many they are
    u32 measure;
    u32 with_mass;   // whether top-p will need masses
};
static_assert(sizeof(Search) == 40, "the launcher's SEARCH_WORDS");

__device__ __forceinline__ Search load_search(const Search* p) {
    Search s;
    s.above.count = load_activation_element(&p->above.count);
    s.above.mass = load_activation_element(&p->above.mass);
    s.target = load_activation_element(&p->target);
    s.prefix = load_activation_element(&p->prefix);
    s.level = load_activation_element(&p->level);
    s.measure = load_activation_element(&p->measure);
    s.with_mass = load_activation_element(&p->with_mass);
    return s;
}

constexpr int digit_bits(int level) { return level == 2 ? 10 : 11; }
__device__ __forceinline__ int digit_shift(int level) { return level == 0 ? 21 : level == 1 ? 10 : 0; }
constexpr int most_bins = 1 << digit_bits(0);

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
// Thresholds
// ---------------------------------------------------------------------------------------------------------------

// One digit's histogram of a block. Masses are u64 in two halves: shared memory adds 32 bits at a time.
struct BlockHistogram {
    u32 count[most_bins], low[most_bins], high[most_bins];
};

__device__ __forceinline__ void add_to_bin(BlockHistogram& h, u32 bin, u64 mass) {
    atomicAdd(&h.count[bin], 1u);
    const u32 low = static_cast<u32>(mass);
    u32 high = static_cast<u32>(mass >> 32);
    // Exactly one of the adders sees each overflow of the lower half.
    if (low && atomicAdd(&h.low[bin], low) > ~low) high++;
    if (high) atomicAdd(&h.high[bin], high);
}

// histograms[row][count, mass][bins] += this rank's tokens by digit `level` of their keys, for rows that search it.
// Only tokens with the row's higher digits count. Grid: blocks of a row, rows.
extern "C" __global__ void __launch_bounds__(block_threads)
count_digits(const float* logits, const float* temperature, const float* row_max, const Search* search,
             u64* histograms, int columns, int level) {
    __shared__ BlockHistogram h;
    pdl_wait();
    const int row = blockIdx.y;
    const Search s = load_search(search + row);
    if (s.measure == done || s.level != level) return;
    const int bits = digit_bits(level), bins = 1 << bits, shift = digit_shift(level);
    for (int bin = threadIdx.x; bin < bins; bin += block_threads) h.count[bin] = h.low[bin] = h.high[bin] = 0;
    __syncthreads();
    const float m = load_activation_element(row_max + row), t = load_activation_element(temperature + row);
    for_each_group(row_of(logits, row, columns), columns, 0, 0.0f, [&](int column, const float (&x)[width]) {
#pragma unroll
        for (int j = 0; j < width; j++) {
            const float z = score(x[j], m, t);
            const u32 key = ordered_key(z);
            if (!inside(column + j, columns) || (level && key >> (shift + bits) != s.prefix)) continue;
            add_to_bin(h, key >> shift & (bins - 1), s.with_mass ? integer_mass(z) : 0);
        }
    });
    pdl_launch_dependents();
    __syncthreads();
    u64* counts = row_of(histograms, row, 2 * bins);
    for (int bin = threadIdx.x; bin < bins; bin += block_threads) {
        const u64 mass = static_cast<u64>(h.high[bin]) << 32 | h.low[bin];
        if (h.count[bin]) atomicAdd(counts + bin, static_cast<u64>(h.count[bin]));
        if (mass) atomicAdd(counts + bins + bin, mass);
    }
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
// Draw (sampling.py, philox.py)
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 philox4x32(uint4 counter, u64 key) {
    u32 k0 = static_cast<u32>(key), k1 = static_cast<u32>(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 high0 = __umulhi(counter.x, 0xd2511f53u), low0 = counter.x * 0xd2511f53u;
        const u32 high1 = __umulhi(counter.z, 0xcd9e8d57u), low1 = counter.z * 0xcd9e8d57u;
        counter = make_uint4(high1 ^ counter.y ^ k0, low1, high0 ^ counter.w ^ k1, low0);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return counter;
}

// log(v) for normal v > 0 within 3 units in the last place, the same bits on every machine: v = 2^k m with m in
// [sqrt(1/2), sqrt(2)), log(m) = 2 artanh(s), s = (m - 1) / (m + 1), by its series.
__device__ __forceinline__ float natural_log(float v) {
    constexpr int least_mantissa = 0x3f3504f3;  // sqrt(1/2)
    const int offset = __float_as_int(v) - least_mantissa;
    const float k = static_cast<float>(offset >> 23);
    const float f = __fsub_rn(__int_as_float((offset & 0x007fffff) + least_mantissa), 1.0f);
    const float s = __fdiv_rn(f, __fadd_rn(f, 2.0f));
    const float w = __fmul_rn(s, s);
    float series = 2.0f / 9;
    series = __fadd_rn(__fmul_rn(series, w), 2.0f / 7);
    series = __fadd_rn(__fmul_rn(series, w), 2.0f / 5);
    series = __fadd_rn(__fmul_rn(series, w), 2.0f / 3);
    const float log_m = __fadd_rn(__fmul_rn(s, 2.0f), __fmul_rn(__fmul_rn(s, w), series));
    // ln(2) = 0.693145751953125 + 1.42860677e-6: k times the first is exact.
    return __fadd_rn(__fmul_rn(k, 0.693145751953125f), __fadd_rn(__fmul_rn(k, 1.42860677e-6f), log_m));
}

// -log(-log(1 - u)) with u = (bits + 1/2) 2^-32. What 1 - u loses by rounding is added again as c / v.
__device__ __forceinline__ float gumbel(u32 bits) {
    const float u = fminf(__fmul_rn(__fadd_rn(static_cast<float>(bits), 0.5f), 2.32830644e-10f), 0.99999994f);
    const float v = __fsub_rn(1.0f, u);
    const float c = __fsub_rn(__fsub_rn(1.0f, v), u);
    return -natural_log(-__fadd_rn(natural_log(v), __fdiv_rn(c, v)));
}

// pairs[row] = the greatest score + noise among tokens with a score of at least least[row], and its token id; no_pair
// where there is none or the row is not drawn. Grid, parts, tickets: as of row_argmax.
extern "C" __global__ void __launch_bounds__(block_threads)
draw(const float* logits, const float* temperature, const float* row_max, const float* least, const u64* seed,
     const i64* sample_index, const i64* position, u64* parts, u32* tickets, u64* pairs, int columns, i64 vocab_start) {
    __shared__ u64 scratch[warps];
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.y;
    const float m = load_activation_element(row_max + row), t = load_activation_element(temperature + row);
    // Somewhere a token has score 0 and at least the least noise: one that is further down cannot win.
    const float floor = load_activation_element(least + row), cut = fmaxf(floor, -25.8f);
    u64 best = no_pair;
    if (t > 0.0f && floor == floor && m > negative_infinity()) {
        const u64 key = load_activation_element(seed + row);
        const u32 where = static_cast<u32>(load_activation_element(position + row));
        const u32 sample = static_cast<u32>(load_activation_element(sample_index + row));
        // Groups are those of four token ids that share one call of Philox.
        for_each_group(row_of(logits, row, columns), columns, static_cast<int>(vocab_start & 3), negative_infinity(),
                       [&](int column, const float (&x)[width]) {
            float z[width];
            bool any = false;
#pragma unroll
            for (int j = 0; j < width; j++) {
                z[j] = score(x[j], m, t);
                any = any || z[j] >= cut;
            }
            if (!any) return;
            const u32 id = static_cast<u32>(vocab_start + column);
            const uint4 random = philox4x32(make_uint4(id / width, where, sample, 0), key);
            const u32 words[width] = {random.x, random.y, random.z, random.w};
#pragma unroll
            for (int j = 0; j < width; j++)
                if (z[j] >= cut) best = max(best, pack_pair(__fadd_rn(z[j], gumbel(words[j])), id + j));
        });
    }
    finish_row_max(best, row_of(parts, row, gridDim.x), tickets + row, pairs + row, scratch);
}

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
