// Sampling on vocabulary shards: penalties, row maximum, exact top-k / top-p / min-p, Gumbel draw, log-probabilities.
// Specification: sampling.py, sampling_keys.py, sampling_thresholds.py, philox.py, logprobs.py, penalties.py.
//
// Each step leaves a small record per row. Ranks exchange the records, which is not done here: the kernels that
// combine them read [n_ranks, ...] buffers. Records are integers wherever that is possible: the blocks of a row and
// the ranks may then combine them in any order, and the choice of a token does not depend on the batch, the grid or
// the sharding. What must come out the same as in NumPy, bit for bit, uses the operations __fmul_rn, __fadd_rn, ...,
// which the compiler never fuses.
//
// archs: sm_80 sm_90a sm_100
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
// Penalties and bias (penalties.py)
// ---------------------------------------------------------------------------------------------------------------

constexpr int prompt_flag = 1 << 30;

__device__ __forceinline__ int slot_of(const int* slots, int i) {
    return slots ? load_activation_element(slots + i) : i;
}

__device__ __forceinline__ float penalised(float x, int count, float repetition, float presence, float frequency) {
    const int generated = count & (prompt_flag - 1);
    x = x < 0 ? __fmul_rn(x, repetition) : __fdiv_rn(x, repetition);
    x = __fsub_rn(x, __fmul_rn(frequency, static_cast<float>(generated)));
    return generated ? __fsub_rn(x, presence) : x;
}

// Changes logits[row][columns] where the row's counts are not 0; counts[slot][columns]. Grid: blocks of a row, rows.
extern "C" __global__ void __launch_bounds__(block_threads)
apply_penalties(float* logits, const int* counts, const int* slots, const float* repetition, const float* presence,
                const float* frequency, int columns) {
    pdl_wait();
    pdl_launch_dependents();
    const int row = blockIdx.y, slot = slot_of(slots, row);
    if (slot < 0) return;
    const float r = load_activation_element(repetition + row), p = load_activation_element(presence + row),
                f = load_activation_element(frequency + row);
    if (r == 1.0f && p == 0.0f && f == 0.0f) return;
    float* x = row_of(logits, row, columns);
    for_each_group(row_of(counts, slot, columns), columns, 0, 0, [&](int column, const int (&count)[width]) {
#pragma unroll
        for (int j = 0; j < width; j++)
            if (count[j]) x[column + j] = penalised(load_activation_element(x + column + j), count[j], r, p, f);
    });
}

// logits[row][id] += value for the row's list of `per_row` ids that differ from each other; a negative id is none.
extern "C" __global__ void __launch_bounds__(block_threads)
add_logit_bias(float* logits, const int* ids, const float* values, int per_row, int columns, i64 vocab_start) {
    pdl_wait();
    pdl_launch_dependents();
    float* x = row_of(logits, blockIdx.x, columns);
    for (int i = threadIdx.x; i < per_row; i += block_threads) {
        const i64 entry = static_cast<i64>(blockIdx.x) * per_row + i;
        const i64 column = load_activation_element(ids + entry) - vocab_start;
        if (column >= 0 && column < columns)
            x[column] = __fadd_rn(load_activation_element(x + column), load_activation_element(values + entry));
    }
}

// counts[slot of i][token i] += 1, or, where in_prompt, marks the token as one of the prompt.
extern "C" __global__ void __launch_bounds__(block_threads)
count_tokens(int* counts, const int* slots, const i64* tokens, int n_tokens, int columns, i64 vocab_start,
             int in_prompt) {
    pdl_wait();
    pdl_launch_dependents();
    const int i = blockIdx.x * block_threads + threadIdx.x;
    if (i >= n_tokens) return;
    const int slot = slot_of(slots, i);
    const i64 column = load_activation_element(tokens + i) - vocab_start;
    if (slot < 0 || column < 0 || column >= columns) return;
    int* count = row_of(counts, slot, columns) + column;
    if (in_prompt) atomicOr(count, prompt_flag);
    else atomicAdd(count, 1);
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
    pdl_launch_dependents();
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
    pdl_wait();
    pdl_launch_dependents();
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
    pdl_wait();
    pdl_launch_dependents();
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
    pdl_launch_dependents();
    finish_row_max(best, row_of(parts, row, gridDim.x), tickets + row, pairs + row, scratch);
}

// tokens[row] = the token of the greatest of the ranks' pairs [n_ranks][batch], -1 if there is none. Greedy rows keep
// the token they have.
extern "C" __global__ void __launch_bounds__(block_threads)
combine_draw(const u64* pairs, int n_ranks, int batch, const float* temperature, i64* tokens) {
    pdl_wait();
    pdl_launch_dependents();
    const int row = blockIdx.x * block_threads + threadIdx.x;
    if (row >= batch || !(load_activation_element(temperature + row) > 0.0f)) return;
    u64 best = no_pair;
    for (int rank = 0; rank < n_ranks; rank++)
        best = max(best, load_activation_element(row_of(pairs, rank, batch) + row));
    tokens[row] = best == no_pair ? -1 : pair_id(best);
}

// ---------------------------------------------------------------------------------------------------------------
// Log-probabilities (logprobs.py)
// ---------------------------------------------------------------------------------------------------------------

constexpr int most_top = 20;
constexpr int slice_groups = 8;                                      // of a thread
constexpr int slice_columns = slice_groups * width * block_threads;  // of a block: fixed, as sums depend on it
constexpr int most_slices = 32;
constexpr int most_candidates = slice_groups * width * most_top;  // of a block
static_assert(most_candidates >= most_slices * most_top, "the merge of a row's slices uses the same memory");

// A record: the greatest pair, the bits of the double sum(exp(x - greatest)), the target's logit, the top pairs.
constexpr int pair_word = 0, sum_word = 1, target_word = 2, top_word = 3;
constexpr u64 target_here = 1ull << 32;

__device__ __forceinline__ double sum_of(u64 word) { return __longlong_as_double(static_cast<i64>(word)); }
__device__ __forceinline__ u64 word_of(double sum) { return static_cast<u64>(__double_as_longlong(sum)); }

// x - m; 0 for two equal infinities.
template <class T> __device__ __forceinline__ T relative(T x, T m) { return x == m ? T(0) : x - m; }

__device__ __forceinline__ double warp_sum_double(double v) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) v += shuffle_xor(v, distance);
    return v;
}

// How many pairs of `lists` falling lists of n are greater than `pair`, counted up to n. at(l, i) is pair i of list l.
template <class At> __device__ __forceinline__ int place_among(u64 pair, int lists, int n, At at) {
    int place = 0;
    for (int l = 0; l < lists && place < n; l++)
        for (int i = 0; i < n && place < n && at(l, i) > pair; i++) place++;
    return place;
}

// This thread's groups of the block's slice of a row; groups outside the row hold -inf.
struct Slice {
    float values[slice_groups][width];
    int column;  // of the first group; the next is block_threads groups further
};

__device__ __forceinline__ int slice_column(const Slice& s, int i) { return s.column + i * block_threads * width; }

// visit(pair) for this thread's pairs.
template <class Visit>
__device__ __forceinline__ void for_each_pair(const Slice& s, int columns, i64 vocab_start, Visit visit) {
#pragma unroll
    for (int i = 0; i < slice_groups; i++)
#pragma unroll
        for (int j = 0; j < width; j++) {
            const int column = slice_column(s, i) + j;
            if (column < columns) visit(pack_pair(s.values[i][j], static_cast<u32>(vocab_start + column)));
        }
}

struct TopScratch {
    u64 maxima[block_threads];
    u64 candidates[most_candidates];
    u64 bound;
    u32 n_candidates;
};

// top[0..n) = the slice's n greatest pairs, falling, no_pair where it has fewer. The n-th greatest of the threads' own
// maxima bounds them from below, and only the n threads above it have candidates. `mine` is this thread's maximum.
__device__ __forceinline__ void top_of_slice(const Slice& slice, u64 mine, int columns, i64 vocab_start, int n,
                                             u64* top, TopScratch& t) {
    t.maxima[threadIdx.x] = mine;
    if (threadIdx.x == 0) {
        t.bound = no_pair + 1;
        t.n_candidates = 0;
    }
    if (static_cast<int>(threadIdx.x) < n) top[threadIdx.x] = no_pair;
    __syncthreads();
    int greater = 0;
    for (int i = 0; i < block_threads; i++) greater += t.maxima[i] > mine;
    if (greater == n - 1 && mine != no_pair && mine != nan_pair) t.bound = mine;
    __syncthreads();
    if (greater < n)
        for_each_pair(slice, columns, vocab_start, [&](u64 pair) {
            if (pair >= t.bound && pair != nan_pair) t.candidates[atomicAdd(&t.n_candidates, 1u)] = pair;
        });
    __syncthreads();
    for (u32 i = threadIdx.x; i < t.n_candidates; i += block_threads) {
        int place = 0;
        for (u32 k = 0; k < t.n_candidates; k++) place += t.candidates[k] > t.candidates[i];
        if (place < n) top[place] = t.candidates[i];
    }
}

// records[row] from parts[row], the same words of each of its slices (of which the third is not used), in their order.
__device__ __forceinline__ void merge_slices(const u64* parts, int slices, int n_top, u64* record, u64* pairs) {
    const int words = top_word + n_top;
    for (int i = threadIdx.x; i < slices * n_top; i += block_threads)
        pairs[i] = load_activation_element(parts + (i / n_top) * words + top_word + i % n_top);
    if (static_cast<int>(threadIdx.x) < n_top) record[top_word + threadIdx.x] = no_pair;
    __syncthreads();
    for (int i = threadIdx.x; i < slices * n_top; i += block_threads) {
        if (pairs[i] == no_pair) continue;
        const int place = place_among(pairs[i], slices, n_top, [&](int l, int k) { return pairs[l * n_top + k]; });
        if (place < n_top) record[top_word + place] = pairs[i];
    }
    if (warp_id() != 0) return;
    u64 pair = no_pair;
    double sum = 0;
    if (lane_id() < slices) {
        pair = load_activation_element(parts + lane_id() * words + pair_word);
        sum = sum_of(load_activation_element(parts + lane_id() * words + sum_word));
    }
    const u64 best = warp_max_pair(pair);
    if (lane_id() < slices)
        sum *= exp(relative(static_cast<double>(pair_value(pair)), static_cast<double>(pair_value(best))));
    sum = warp_sum_double(sum);
    if (lane_id() == 0) {
        record[pair_word] = best;
        record[sum_word] = word_of(sum);
    }
}

// records[row][3 + n_top] of this rank's columns for rows with wanted[row] >= 0. Grid: slices of a row (at least 1),
// rows. parts: [rows][slices][3 + n_top]. tickets: [rows], zeros.
extern "C" __global__ void __launch_bounds__(block_threads, 2)
logprob_records(const float* logits, const int* wanted, const i64* targets, u64* parts, u32* tickets, u64* records,
                int columns, i64 vocab_start, int n_top) {
    __shared__ u64 scratch[warps];
    __shared__ double sums[warps];
    __shared__ TopScratch top_scratch;
    __shared__ u64 block_best;
    __shared__ u32 last;
    pdl_wait();
    const int row = blockIdx.y, slices = gridDim.x, words = top_word + n_top;
    if (load_activation_element(wanted + row) < 0) return;
    const float* x = row_of(logits, row, columns);
    u64* record = row_of(records, row, words);

    Slice slice;
    slice.column = static_cast<int>(blockIdx.x) * slice_columns + static_cast<int>(threadIdx.x) * width;
#pragma unroll
    for (int i = 0; i < slice_groups; i++)
        load_group(x, slice_column(slice, i), columns, negative_infinity(), slice.values[i]);
    u64 mine = no_pair;
    for_each_pair(slice, columns, vocab_start, [&](u64 pair) { mine = max(mine, pair); });
    const u64 first_warps = block_max_pair(mine, scratch);
    if (threadIdx.x == 0) block_best = first_warps;
    __syncthreads();

    u64* part = slices == 1 ? record : parts + (static_cast<i64>(row) * slices + blockIdx.x) * words;
    const float m = pair_value(block_best);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < slice_groups; i++)
#pragma unroll
        for (int j = 0; j < width; j++)
            sum += expf(relative(slice.values[i][j], m));  // columns outside the row hold -inf
    const double warps_sum = warp_sum_double(sum);
    if (lane_id() == 0) sums[warp_id()] = warps_sum;
    if (n_top) top_of_slice(slice, mine, columns, vocab_start, n_top, part + top_word, top_scratch);
    __syncthreads();  // also orders what all threads have written before the first thread's ticket
    if (threadIdx.x == 0) {
        double total = 0;
        for (int i = 0; i < warps; i++) total += sums[i];
        part[pair_word] = block_best;
        part[sum_word] = word_of(total);
        if (blockIdx.x == 0) {
            const i64 target = load_activation_element(targets + row) - vocab_start;
            const bool here = target >= 0 && target < columns;
            record[target_word] = here ? target_here | __float_as_uint(load_activation_element(x + target)) : 0;
        }
    }
    pdl_launch_dependents();
    if (slices == 1) return;
    if (warp_id() == 0) {
        const bool is_last = is_last_block(tickets + row);
        if (lane_id() == 0) last = is_last;
    }
    __syncthreads();
    if (last) merge_slices(parts + static_cast<i64>(row) * slices * words, slices, n_top, record,
                           top_scratch.candidates);
}

// From the ranks' records [n_ranks][batch][3 + n_top], for rows with wanted[row] >= 0: the target's log-probability
// (NaN if no rank has the target or a logit is NaN), whether it is the greedy token, and the n_top most probable tokens
// with theirs, -1 and -inf where the vocabulary has fewer. Sums are added in rank order. Grid: rows, one warp each.
extern "C" __global__ void __launch_bounds__(warp_size)
combine_logprobs(const u64* records, int n_ranks, int batch, const int* wanted, const i64* targets, int n_top,
                 float* logprobs, u8* is_greedy, i64* top_ids, float* top_logprobs) {
    pdl_wait();
    pdl_launch_dependents();
    const int row = blockIdx.x, words = top_word + n_top;
    if (load_activation_element(wanted + row) < 0) return;
    const auto record = [&](int rank) { return records + (static_cast<i64>(rank) * batch + row) * words; };
    u64 best = no_pair;
    for (int rank = 0; rank < n_ranks; rank++) best = max(best, load_activation_element(record(rank) + pair_word));
    const float greatest = pair_value(best);
    const double m = greatest > negative_infinity() ? greatest : not_a_number();
    double sum = 0;
    u64 target = 0;
    for (int rank = 0; rank < n_ranks; rank++) {
        const u64 pair = load_activation_element(record(rank) + pair_word);
        if (pair != no_pair)
            sum += sum_of(load_activation_element(record(rank) + sum_word)) *
                   exp(relative(static_cast<double>(pair_value(pair)), m));
        target |= load_activation_element(record(rank) + target_word);  // one rank has it, the others 0
    }
    const double log_sum = log(sum);
    const auto logprob = [&](float x) { return static_cast<float>(relative(static_cast<double>(x), m) - log_sum); };
    if (lane_id() == 0) {
        const float x = __uint_as_float(static_cast<u32>(target));
        logprobs[row] = target & target_here ? logprob(x) : not_a_number();
        is_greedy[row] = greatest > negative_infinity() && pair_id(best) == load_activation_element(targets + row);
    }
    for (int i = lane_id(); i < n_top; i += warp_size) {
        top_ids[static_cast<i64>(row) * n_top + i] = -1;
        top_logprobs[static_cast<i64>(row) * n_top + i] = negative_infinity();
    }
    __syncwarp();
    for (int i = lane_id(); i < n_ranks * n_top; i += warp_size) {
        const u64 pair = load_activation_element(record(i / n_top) + top_word + i % n_top);
        if (pair == no_pair) continue;
        const int place = place_among(pair, n_ranks, n_top, [&](int l, int k) {
            return load_activation_element(record(l) + top_word + k);
        });
        if (place >= n_top) continue;
        top_ids[static_cast<i64>(row) * n_top + place] = pair_id(pair);
        top_logprobs[static_cast<i64>(row) * n_top + place] = logprob(pair_value(pair));
    }
}
