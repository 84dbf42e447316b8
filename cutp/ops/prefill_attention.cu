// Causal attention of a ragged batch over the paged key-value cache, for requests that bring many new tokens.
// Specification: attention.py.
//
// A block computes rows of one key-value head: row r is token r / group with query head r % group of that head's
// `group`, so the heads that share keys share their loads too, and a short chunk fills the tile. It walks the blocks
// of keys from the rows' last position down, with running softmax. Blocks begin at multiples of `key_block` in the
// sequence, and one that a row does not see leaves that row's numbers as they are to the bit: the result of a row
// depends neither on the chunk nor on the batch that it is computed in.
//
// bf16 and f16 run on tensor cores; float keeps all its bits by plain multiply-adds.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32 HEAD_DIM=64,80,96,128,256
#include "device.cuh"
#include "prefill_tile.cuh"
#include "prefill_float.cuh"

// ---- rows on tensor cores: a warp has `warp_tiles` tiles of 16 rows; of each, a lane has rows lane / 4 and
// lane / 4 + 8, and of every 8 columns the two at 2 (lane % 4)

template <class T> struct TensorCoreRows {
    float weighted[warp_tiles][HEAD_DIM / 8][4];  // sums of values
    float scores[warp_tiles][key_block / 8][4];   // then their weights
    float peaks[warp_tiles][2], totals[warp_tiles][2];

    __device__ __forceinline__ static int row(int tile, int half) {
        return warp_id() * warp_rows + tile * 16 + half * 8 + lane_id() / 4;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < warp_tiles; i++) {
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] = 0.0f;
            peaks[i][0] = peaks[i][1] = negative_infinity();
            totals[i][0] = totals[i][1] = 0.0f;
        }
    }

    // The queries are read again for every block: there are no registers to keep them.
    __device__ __forceinline__ void multiply_keys(u32 queries, u32 keys) {
        const int lane = lane_id();
        queries += (warp_id() * warp_rows + lane % 16) * row_bytes + lane / 16 * 16;
        keys += (lane % 8 + lane / 16 * 8) * row_bytes + lane / 8 % 2 * 16;
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) scores[i][j][e] = 0.0f;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            u32 a[warp_tiles][4];
#pragma unroll
            for (int i = 0; i < warp_tiles; i++) ldmatrix_x4(a[i], queries + i * 16 * row_bytes + k * 32);
#pragma unroll
            for (int j = 0; j < key_block / 8; j += 2) {
                u32 b[4];
                ldmatrix_x4(b, keys + j * 8 * row_bytes + k * 32);
#pragma unroll
                for (int i = 0; i < warp_tiles; i++) {
                    mma_m16n8k16<T>(scores[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                    mma_m16n8k16<T>(scores[i][j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
                }
            }
        }
    }

    __device__ __forceinline__ void cap_scores(const Problem& p) {
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    scores[i][j][e] = soft_capped(scores[i][j][e] * p.score_factor, p.softcap);
    }

    __device__ __forceinline__ void mask(const RowTable& table, int first_key, int window) {
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int position = table.position[row(i, half)];
#pragma unroll
                for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (!sees(position, first_key + j * 8 + lane_id() % 4 * 2 + e, window))
                            scores[i][j][2 * half + e] = negative_infinity();
            }
    }

    __device__ __forceinline__ void scores_to_weights(float exponent_factor) {
        float factors[warp_tiles][2];
        bool risen = false;
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float greatest = negative_infinity();
#pragma unroll
                for (int j = 0; j < key_block / 8; j++)
                    greatest = fmaxf(greatest, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
                greatest = fmaxf(greatest, shuffle_xor(greatest, 1));
                greatest = fmaxf(greatest, shuffle_xor(greatest, 2));
                float base, sum = 0.0f;
                factors[i][half] = raise_peak(peaks[i][half], greatest * exponent_factor, base);
                risen |= factors[i][half] != 1.0f;
#pragma unroll
                for (int j = 0; j < key_block / 8; j++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        scores[i][j][e] = exp2_approx(fmaf(scores[i][j][e], exponent_factor, -base));
                        sum += scores[i][j][e];
                    }
                totals[i][half] = fmaf(totals[i][half], factors[i][half], sum);
            }
        // Peaks seldom rise after the first blocks.
        if (ballot(risen) != 0) scale_sums(factors);
    }

    __device__ __forceinline__ void scale_sums(const float (&factors)[warp_tiles][2]) {
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] *= factors[i][e / 2];
    }

    __device__ __forceinline__ void multiply_values(u32 values, unsigned char*) {
        values += lane_id() % 16 * row_bytes + lane_id() / 16 * 16;
#pragma unroll
        for (int k = 0; k < key_block / 16; k++) {
            u32 a[warp_tiles][4];
#pragma unroll
            for (int i = 0; i < warp_tiles; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    a[i][e] = pack2<T>(scores[i][2 * k + e / 2][e % 2 * 2], scores[i][2 * k + e / 2][e % 2 * 2 + 1]);
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j += 2) {
                u32 b[4];
                ldmatrix_x4_trans(b, values + k * 16 * row_bytes + j * 16);
#pragma unroll
                for (int i = 0; i < warp_tiles; i++) {
                    mma_m16n8k16<T>(weighted[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                    mma_m16n8k16<T>(weighted[i][j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
                }
            }
        }
    }

    // Through the warp's own rows of the queries' tile, to write whole vectors.
    __device__ __forceinline__ void store(const Problem& p, const Work& w, const RowTable& table,
                                          unsigned char* queries) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < warp_tiles; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float total = totals[i][half];
                total += shuffle_xor(total, 1);
                total += shuffle_xor(total, 2);
                const int r = row(i, half);
                const float factor = reciprocal_total(total, peaks[i][half], p.sinks, table.head[r]);
                u32* to = reinterpret_cast<u32*>(queries + r * row_bytes) + lane_id() % 4;
#pragma unroll
                for (int j = 0; j < HEAD_DIM / 8; j++)
                    to[j * 4] = pack2<T>(weighted[i][j][2 * half] * factor, weighted[i][j][2 * half + 1] * factor);
            }
        __syncwarp();
#pragma unroll 4
        for (int i = lane_id(); i < warp_rows * row_vectors; i += warp_size) {
            const int r = warp_id() * warp_rows + i / row_vectors, v = i % row_vectors;
            if (table.position[r] < 0) continue;
            const i64 row = static_cast<i64>(table.position[r] + w.row_minus_position) * p.n_heads + table.head[r];
            const uint4 result = load_shared(shared_address(queries) + r * row_bytes + v * 16);
            store_vector(p.out + row * HEAD_DIM + v * width, result);
        }
    }
};

// ---- the walk

// Whether any row of this warp sees any key of the block.
__device__ __forceinline__ bool warp_sees(const RowTable& table, int first_key, int window) {
    const int position = table.position[warp_id() * warp_rows + lane_id() % warp_rows];
    return ballot(position >= first_key && position - window < first_key + key_block - 1) != 0;
}

template <class Rows> __device__ __forceinline__ void attend(const Problem& p) {
    __shared__ RowTable table;
    unsigned char* shared = dynamic_shared();
    const u32 queries = shared_address(shared);
    const u32 tiles = queries + block_rows * row_bytes;
    unsigned char* weights = shared + block_rows * row_bytes + 4 * tile_bytes;
    pdl_wait();
    const Work w = read_work(p);
    if (w.rows <= 0) return;
    fill_row_table(p, w, table);
    __syncthreads();

    int block = w.last_position / key_block;
    u32 stage = tiles, pages = look_up_pages(p, w, block);
    load_queries(p, w, table, queries);
    load_keys_and_values(p, w, stage, block, pages);
    cp_async_commit();
    pages = look_up_pages(p, w, block - 1);
    // A chunk of few tokens leaves warps without rows: they only help to load.
    const bool has_rows = warp_id() * warp_rows < w.rows;
    Rows rows;
    rows.clear();
#pragma unroll 1
    for (; (block + 1) * key_block > w.first_key; block--) {
        const int first_key = block * key_block;
        const u32 keys = stage, values = stage + tile_bytes;
        stage = tiles + (stage == tiles ? 2 * tile_bytes : 0);
        cp_async_wait<0>();
        __syncthreads();  // this block is there, and the one before is done with
        if (first_key > w.first_key) {
            load_keys_and_values(p, w, stage, block - 1, pages);
            cp_async_commit();
            pages = look_up_pages(p, w, block - 2);
        }
        const bool ends_later = first_key + key_block - 1 > w.first_position;
        const bool partly_seen = ends_later || first_key <= w.last_position - p.window;
        if (!has_rows || (partly_seen && !warp_sees(table, first_key, p.window))) continue;
        rows.multiply_keys(queries, keys);
        if (p.softcap != 0.0f) rows.cap_scores(p);
        if (partly_seen) rows.mask(table, first_key, p.window);
        rows.scores_to_weights(p.exponent_factor);
        rows.multiply_values(values, weights);
    }
    pdl_launch_dependents();
    rows.store(p, w, table, shared);
}

template <class T> struct RowsOf { typedef TensorCoreRows<T> type; };
template <> struct RowsOf<float> { typedef FloatRows<float> type; };

// out[T, n_heads, D] = attention of q[T, n_heads, D], whose tokens are q_stride elements apart, over
// pages[P, 2, n_kv_heads, page_size, D]. work_list[n_items, 2]: request (-1: none) and the first of the
// 128 / (n_heads / n_kv_heads) tokens of an item; grid: n_items * parts * n_kv_heads. sinks may be null.
extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
prefill_attention(const scalar_t* q, const scalar_t* pages, const float* sinks, scalar_t* out, const int* lookup_table,
                  const int* input_row_offsets, const int* cache_lengths, const int* work_list, i64 q_stride,
                  u64 page_groups_reciprocal, int table_width, int page_size, int n_heads, int n_kv_heads, int window,
                  float softcap, float score_factor, float exponent_factor) {
    attend<RowsOf<scalar_t>::type>(
        {q, pages, sinks, out, lookup_table, input_row_offsets, cache_lengths, work_list, q_stride,
         page_groups_reciprocal, table_width, page_size, n_heads, n_kv_heads, window, softcap, score_factor,
         exponent_factor});
}
