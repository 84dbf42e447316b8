// Sampling on vocabulary shards, the steps that walk along the logits: row maximum, digits of top-k and top-p, draw.
// Specification: sampling.py, sampling_keys.py, sampling_thresholds.py, philox.py.
//
// Logits of 16 bits stand for their values as float: the tokens are those of the logits converted first.
//
// Each step leaves a small record per row, which sampling_records.cu combines over the ranks. Records are integers
// wherever that is possible: the blocks of a row and the ranks may then combine them in any order, and the choice of a
// token does not depend on the batch, the grid or the sharding. What must come out the same as in NumPy, bit for bit,
// uses the operations __fmul_rn, __fadd_rn, ..., which the compiler never fuses.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32
#include "device.cuh"
#include "philox.cuh"
#include "sampling_search.cuh"
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

// ---------------------------------------------------------------------------------------------------------------
// Row maximum
// ---------------------------------------------------------------------------------------------------------------

// pairs[row] = the greatest logit and the lowest token id that has it; nan_pair if the row has a NaN, no_pair if it has
// no columns or its temperature is negative, which marks rows that are not in use. Grid: blocks of a row, rows.
// parts: [rows][blocks of a row]. tickets: [rows], zeros.
extern "C" __global__ void __launch_bounds__(block_threads)
row_argmax(const scalar_t* logits, const float* temperature, u64* parts, u32* tickets, u64* pairs, int columns,
           i64 vocab_start) {
    __shared__ u64 scratch[warps];
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.y;
    u64 best = no_pair;
    if (!(load_activation_element(temperature + row) < 0.0f))
        for_each_group(row_of(logits, row, columns), columns, 0, scalar_t{}, [&](int column, const float (&x)[width]) {
#pragma unroll
            for (int j = 0; j < width; j++)
                if (inside(column + j, columns))
                    best = max(best, pack_pair(x[j], static_cast<u32>(vocab_start + column + j)));
        });
    finish_row_max(best, row_of(parts, row, gridDim.x), tickets + row, pairs + row, scratch);
}

// ---------------------------------------------------------------------------------------------------------------
// Digits of keys (sampling_thresholds.py)
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

// Blocks of count_digits that a multiprocessor has room for, 0 for the compiler's choice: that is four for logits of
// float, but only three for those of 16 bits.
constexpr int blocks_with_room = sizeof(scalar_t) == 2 ? 4 : 0;

// histograms[row][count, mass][bins] += this rank's tokens by digit `level` of their keys, for rows that search it.
// Only tokens with the row's higher digits count. Grid: blocks of a row, rows.
extern "C" __global__ void __launch_bounds__(block_threads, blocks_with_room)
count_digits(const scalar_t* logits, const float* temperature, const float* row_max, const Search* search,
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
    for_each_group(row_of(logits, row, columns), columns, 0, scalar_t{}, [&](int column, const float (&x)[width]) {
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

// ---------------------------------------------------------------------------------------------------------------
// Draw
// ---------------------------------------------------------------------------------------------------------------

// pairs[row] = the greatest score + noise among tokens with a score of at least least[row], and its token id; no_pair
// where there is none or the row is not drawn. Grid, parts, tickets: as of row_argmax.
extern "C" __global__ void __launch_bounds__(block_threads)
draw(const scalar_t* logits, const float* temperature, const float* row_max, const float* least, const u64* seed,
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
        // The four columns of a visit are those of four token ids that share one call of Philox.
        const scalar_t outside = from_float<scalar_t>(negative_infinity());
        for_each_group(row_of(logits, row, columns), columns, static_cast<int>(vocab_start & 3), outside,
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
