// Log-probabilities on vocabulary shards: of given tokens, and the most probable ones. Specification: logprobs.py.
//
// Each rank leaves a small record per row. Ranks exchange the records, which is not done here: the kernel that combines
// them reads a [n_ranks, ...] buffer. Sums are added in an order that depends on the number of columns and ranks alone.
//
// archs: sm_80 sm_90a sm_100
#include "device.cuh"
#include "vocab_rows.cuh"

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
    for (int i = 0; i < slice_groups; i++) {
        Group<float> group;
        load_group(x, slice_column(slice, i), columns, negative_infinity(), group);
#pragma unroll
        for (int j = 0; j < width; j++) slice.values[i][j] = group.values[j];
    }
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
