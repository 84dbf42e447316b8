// Causal attention of a ragged batch over the paged key-value cache on Hopper: what prefill_attention.cu does, by
// the tensor copy engine and products of whole warpgroups. Specification: attention.py.
//
// An item is up to `rows` rows of one key-value head: row r is token r / group with query head r % group of that head's
// `group`, so the heads that share keys share their loads too, and a short chunk fills the rows. One warp, the loader,
// brings queries, keys and values of one item after the other; warpgroups of 64 rows each compute. Blocks of keys begin
// at multiples of `key_block` in the sequence and are walked from the last position down, with running softmax; one
// that a row does not see leaves that row's numbers as they are: the result of a row depends neither on the chunk nor
// on the batch that it is computed in.
//
// A warpgroup has two products in flight, the scores of a block and the weighted values of the block before, and
// computes weights meanwhile. Warpgroups take turns in starting their products, so that one computes weights while
// the tensor cores work for another. The first scores of an item are under way while the item before is stored.
//
// archs: sm_90a
// variants: DTYPE=BF16,F16 HEAD_DIM=64,80,96,128,256
// variants: DTYPE=BF16,F16 HEAD_DIM=64,80,96,128,256 CAPPED
#include "device.cuh"
#include "hopper.cuh"
#include "prefill_hopper.cuh"

// ---- a warpgroup that computes: warp w has rows 16 w .. 16 w + 15 of its 64; of them, a lane has rows lane / 4 and
// lane / 4 + 8, and of every 8 columns the two at 2 (lane % 4)

__device__ __forceinline__ float soft_capped(float x, float cap) {  // cap * tanh(x)
    const float r = rsqrt_approx(exp2_approx(x * (2 * log2_e)) + 1.0f);
    return fmaf(-2.0f * cap, r * r, cap);
}

// The same value, from which the compiler sees that all lanes have it: addresses of products then take no registers.
__device__ __forceinline__ int uniform(int v) { return shuffle(v, 0); }

template <class T> struct Consumer {
    const Problem& p;
    const Shared& shared;
    const int warpgroup;
    int queries = 0, key_blocks = 0, value_blocks = 0;  // done with so far
    int block;                                          // whose scores were started last
    int bottom_block, first_whole, last_whole;          // of the item
    int valid;                                          // keys of `block` in the sequence, until the rest is cleared
    bool fresh;                                         // there are no sums of values yet
    u32 q[queries_in_registers ? HEAD_DIM / 16 : 1][4];
    float weighted[value_columns / 2];                  // sums of values
    float scores[key_block / 2];                        // then their weights
    u32 weights[key_block / 16][4];                     // rounded
    float peaks[2], totals[2];

    __device__ __forceinline__ Consumer(const Problem& p, const Shared& shared)
        : p(p), shared(shared), warpgroup(uniform(warp_id() / 4 - 1)) {}

    __device__ __forceinline__ void run() {
        if (warpgroup == warpgroups - 1) pass_turn();
        if (!take_item()) return;
        float factors[2];
        start_scores();
        wgmma_wait<0>();
        clear_peaks();
        scores_to_weights(shared.items[0], factors);
        round_weights();
        for (int i = 0;; i++) {
            const Item& item = shared.items[i % item_slots];
            while (block > bottom_block) {
                clear_values();
                await_turn();
                block--;
                start_scores();
                start_values();
                pass_turn();
                wgmma_wait<1>();
                scores_to_weights(item, factors);
                wgmma_wait<0>();
                finish_values();
                scale_sums(factors);
                round_weights();
            }
            clear_values();
            await_turn();
            start_values();
            pass_turn();
            const bool more = take_item();
            wgmma_wait<0>();
            finish_values();
            if (!more) {
                store(item);
                break;
            }
            start_scores();
            store(item);
            wgmma_wait<0>();
            clear_peaks();
            scores_to_weights(shared.items[(i + 1) % item_slots], factors);
            round_weights();
        }
        if (warpgroup == 0) await_turn();  // for every turn that was passed somebody waits
    }

private:
    __device__ __forceinline__ void await_turn() const { named_barrier_sync(1 + warpgroup, 2 * warpgroup_size); }
    __device__ __forceinline__ void pass_turn() const {
        named_barrier_arrive(1 + (warpgroup + 1) % warpgroups, 2 * warpgroup_size);
    }

    // Row `half` of the lane among those of the item.
    __device__ __forceinline__ int row(int half) const {
        return warpgroup * 64 + warp_id() % 4 * 16 + half * 8 + lane_id() / 4;
    }

    __device__ __forceinline__ bool take_item() {
        shared.queries.wait_full(queries);
        const Item& item = shared.items[queries % item_slots];
        block = uniform(item.top_block);
        bottom_block = uniform(item.bottom_block);
        first_whole = uniform(item.first_whole);
        last_whole = uniform(item.last_whole);
        valid = uniform(item.length) - block * key_block;
        fresh = true;
        if (queries_in_registers) load_queries();
        return uniform(item.tokens) > 0;
    }

    // Fragments of this warp's 16 rows. The 16-byte pieces of a row lie permuted by its place among 8.
    __device__ __forceinline__ void load_queries() {
        const int row = warpgroup * 64 + warp_id() % 4 * 16 + lane_id() % 16;
        const u32 address = shared.queries.buffer(queries) + row * panel_row_bytes;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; i++)
            ldmatrix_x4(q[i], address + i / 4 * query_panel_bytes + ((i % 4 * 2 + lane_id() / 16) ^ (row & 7)) * 16);
    }

    __device__ __forceinline__ void start_scores() {
        shared.keys.wait_full(key_blocks);
        const u64 k = matrix_descriptor(shared.keys.buffer(key_blocks), 16, 1024);
        keep_registers(scores);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; i++) {
            const u64 keys = descriptor_at(k, i / 4 * key_panel_bytes + i % 4 * 32);
            if constexpr (queries_in_registers) {
                wgmma_registers<T, key_block, false>(scores, q[i], keys, i > 0);
            } else {
                const u32 own = shared.queries.buffer(queries) + warpgroup * 64 * panel_row_bytes;
                wgmma_shared<T, key_block, false>(
                    scores, descriptor_at(matrix_descriptor(own, 16, 1024), i / 4 * query_panel_bytes + i % 4 * 32),
                    keys, i > 0);
            }
        }
        wgmma_commit();
    }

    __device__ __forceinline__ void start_values() {
        shared.values.wait_full(value_blocks);
        const u64 v = matrix_descriptor(shared.values.buffer(value_blocks), key_panel_bytes, 1024);
        keep_registers(weighted);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < key_block / 16; i++)
            wgmma_registers<T, value_columns, true>(weighted, weights[i], descriptor_at(v, i * 16 * panel_row_bytes),
                                                    i > 0 || !fresh);
        wgmma_commit();
        fresh = false;
    }

    // What a page holds behind the end of the sequence may be NaN, which a weight of zero does not cancel. Every
    // warpgroup writes zeros there itself: they are few, and nobody has to wait for another.
    __device__ __forceinline__ void clear_values() {
        if (valid >= key_block) return;
        shared.values.wait_full(value_blocks);
        const u32 values = shared.values.buffer(value_blocks);
#pragma unroll
        for (int i = 0; i < panels; i++)
#pragma unroll 1
            for (int at = valid * panel_row_bytes + threadIdx.x % warpgroup_size * 16; at < key_panel_bytes;
                 at += warpgroup_size * 16)
                store_shared(values + i * key_panel_bytes + at, make_uint4(0, 0, 0, 0));
        async_shared_fence();
        named_barrier_sync(1 + warpgroups + warpgroup, warpgroup_size);
        valid = key_block;
    }

    __device__ __forceinline__ void finish_values() {
        keep_registers(weighted);
        shared.values.release(value_blocks++);
    }

    __device__ __forceinline__ void clear_peaks() {
        peaks[0] = peaks[1] = negative_infinity();
        totals[0] = totals[1] = 0.0f;
    }

    // Finishes the scores and takes them into the running softmax; `factors` bring earlier sums to the new peaks.
    __device__ __forceinline__ void scores_to_weights(const Item& item, float (&factors)[2]) {
        keep_registers(scores);
        shared.keys.release(key_blocks++);
#ifdef CAPPED  // a variant, as asking here costs those without a cap 2 %; without the test this one spills registers
        if (p.softcap != 0.0f) cap_scores();
#endif
        if (block < first_whole || block > last_whole) mask(item.position - block * key_block);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float base = raise_peak(peaks[half], greatest_score(half) * p.exponent_factor, factors[half]);
            float sums[2] = {0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& score = scores[4 * j + 2 * half + e];
                    score = exp2_approx(fmaf(score, p.exponent_factor, -base));
                    sums[e] += score;
                }
            totals[half] = fmaf(totals[half], factors[half], sums[0] + sums[1]);
        }
        // The compiler must compute all this here, while products are under way, not after the wait that follows: it
        // moves neither arithmetic past these lines nor, with the branch, the wait before them. Totals are never
        // negative; with three warpgroups it pays to have their sums done here too.
        keep_registers(scores);
        keep_registers(totals);
        const bool impossible = warpgroups == 3 && fminf(totals[0], totals[1]) < 0.0f;
        if (block == bottom_block || impossible) shared.queries.release(queries++);
    }

    __device__ __forceinline__ void cap_scores() {
#pragma unroll
        for (int i = 0; i < key_block / 2; i++) scores[i] = soft_capped(scores[i] * p.score_factor, p.softcap);
    }

    // Infinity masks, not a large number: the rounding error of a large number is a large number.
    // `position` of the item's first token, counted from the block's first key.
    __device__ __forceinline__ void mask(int position) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int own = position + row(half) / p.group - lane_id() % 4 * 2;
#pragma unroll
            for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (static_cast<u32>(own - (8 * j + e)) >= static_cast<u32>(p.window))
                        scores[4 * j + 2 * half + e] = negative_infinity();
        }
    }

    __device__ __forceinline__ float greatest_score(int half) const {
        float greatest[2] = {negative_infinity(), negative_infinity()};
#pragma unroll
        for (int j = 0; j < key_block / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) greatest[e] = fmaxf(greatest[e], scores[4 * j + 2 * half + e]);
        const float of_lane = fmaxf(greatest[0], greatest[1]), of_pair = fmaxf(of_lane, shuffle_xor(of_lane, 1));
        return fmaxf(of_pair, shuffle_xor(of_pair, 2));
    }

    // Takes the greatest logarithm of a weight in a new block into `peak`. Returns what logarithms are relative to, 0
    // as long as the row has seen no key; `factor` brings earlier sums there.
    __device__ __forceinline__ static float raise_peak(float& peak, float of_block, float& factor) {
        const float raised = of_block > peak + peak_slack ? of_block : peak;
        const float base = raised == negative_infinity() ? 0.0f : raised;
        factor = exp2_approx(peak - base);
        peak = raised;
        return base;
    }

    __device__ __forceinline__ void scale_sums(const float (&factors)[2]) {
        if (ballot(factors[0] != 1.0f || factors[1] != 1.0f) == 0) return;  // peaks seldom rise after the first blocks
#pragma unroll
        for (int i = 0; i < value_columns / 2; i++) weighted[i] *= factors[i / 2 % 2];
    }

    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < key_block / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) weights[i][e] = pack2<T>(scores[8 * i + 2 * e], scores[8 * i + 2 * e + 1]);
    }

    // The four lanes that share a row exchange pairs of columns, so that each stores whole vectors.
    __device__ __forceinline__ void store(const Item& item) const {
        const int place = lane_id() % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = row(half) / p.group, head = item.kv_head * p.group + row(half) % p.group;
            float total = totals[half];
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            if (p.sinks != nullptr)
                total += exp2_approx(fmaf(load_activation_element(p.sinks + head), log2_e, -peaks[half]));
            const float factor = 1.0f / total;
            const i64 row = static_cast<i64>(item.first_row + token) * p.n_heads + head;
            scalar_t* to = p.out + row * HEAD_DIM;
#pragma unroll
            for (int i = 0; i < value_columns / 32; i++) {
                u32 v[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int at = (4 * i + j) * 4 + 2 * half;
                    v[j] = pack2<T>(weighted[at] * factor, weighted[at + 1] * factor);
                }
                transpose_in_quad(v, place);
                const int column = 32 * i + 8 * place;
                if (token < item.tokens && column < HEAD_DIM)
                    store_vector(to + column, make_uint4(v[0], v[1], v[2], v[3]));
            }
        }
    }

    // v[i] of lane j of the four becomes v[j] of lane i.
    __device__ __forceinline__ static void transpose_in_quad(u32 (&v)[4], int place) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) exchange(v[i], v[i + 1], place & 1, 1);
#pragma unroll
        for (int i = 0; i < 2; i++) exchange(v[i], v[i + 2], place >> 1, 2);
    }
    __device__ __forceinline__ static void exchange(u32& a, u32& b, bool upper, u32 distance) {
        const u32 received = shuffle_xor(upper ? a : b, distance);
        if (upper) a = received;
        else b = received;
    }
};

// out[T, n_heads, D] = attention of q[T, n_heads, D] over the pool of pages. q in boxes of item_tokens x the query
// heads of a key-value head x 64; pages as [pool_rows, D], of which keys of page i, head h begin at row
// (2 i n_kv_heads + h) page_size and values n_kv_heads page_size rows further, in boxes of box_rows x 64, where
// box_rows divides page_size and key_block. work_list[items, 4]: request (-1: none), row of its first token in q,
// position of that token, how many tokens of the request are left from it on, of which the item is the first
// item_tokens. Any grid. l2_bytes: how much of the keys and values should be in use at the same time. sinks may be
// null.
extern "C" __global__ void __launch_bounds__(threads, 1)
prefill_attention_hopper(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap pages, scalar_t* out,
                         const float* sinks, const int* lookup_table, const int* work_list, int items, int item_tokens,
                         int table_width, int page_size, int box_rows, int pool_rows, int n_heads, int n_kv_heads,
                         int l2_bytes, int window, float softcap, float score_factor, float exponent_factor) {
    const Problem p = {out, sinks, lookup_table, work_list, items, item_tokens, table_width, page_size, box_rows,
                       pool_rows, n_heads, n_kv_heads, n_heads / n_kv_heads, l2_bytes, window, softcap,
                       score_factor, exponent_factor};
    const Shared shared;
    if (threadIdx.x == 0) {
        shared.init();
        tensor_map_prefetch(q);
        tensor_map_prefetch(pages);
    }
    __syncthreads();
    pdl_wait();
    pdl_launch_dependents();
    if (threadIdx.x < warpgroup_size) {
        registers_decrease<loader_registers>();
        if (warp_id() == 0) Loader{p, shared, q, pages}.run();
    } else {
        registers_increase<consumer_registers>();
        Consumer<scalar_t>(p, shared).run();
    }
}
