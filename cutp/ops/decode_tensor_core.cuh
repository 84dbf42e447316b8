// What a warp of decode_attention.cu computes in bf16 and f16: keys and values of one tile after the other, which go
// from global memory straight into tensor core operands, by loads of 16 bytes. The products are transposed (tokens x
// heads, dims x heads): tokens and dims fill the 16 rows of an mma, 8 heads its columns.
#pragma once

// With g = lane / 4 and t = lane % 4, this lane's heads are 8n + 2t and 8n + 2t + 1, its dims 64c + 8g .. + 7.
template <class T> struct TensorCoreAttention {
    static constexpr int key_chunks = (HEAD_DIM + 31) / 32, value_chunks = (HEAD_DIM + 63) / 64;
    static constexpr int early_chunks = in_halves ? value_chunks / 2 : value_chunks;  // of values, loaded a tile ahead

    uint4 keys[key_chunks][2];        // tokens g and g + 8, dims 32c + 8t .. + 7
    uint4 values[value_chunks][4];    // tokens 2t, 2t + 1, 2t + 8, 2t + 9, dims 64c + 8g .. + 7
    float out[HEAD_TILES][value_chunks][4][4];  // [n][c][i]: dims 64c + 8g + 2i (both heads), 64c + 8g + 2i + 1 (both)
    float scores[HEAD_TILES][4];      // token g (both heads), token g + 8 (both heads)
    float peak[HEAD_TILES][2], total[HEAD_TILES][2];

    static __device__ __forceinline__ int g() { return lane_id() / 4; }
    static __device__ __forceinline__ int t() { return lane_id() % 4; }
    static __device__ __forceinline__ int value_row(int i) { return 2 * t() + i % 2 + i / 2 * 8; }

    // Of a part of the queries that this lane alone writes and reads.
    static __device__ __forceinline__ u32 query_address(int c, int n) {
        return shared_address(dynamic_shared()) + warp_id() * query_bytes +
               ((c * HEAD_TILES + n) * warp_size + lane_id()) * sizeof(uint4);
    }

    // Of this warp's cosines, with the sines behind them.
    static __device__ __forceinline__ u32 angles_address() {
        return shared_address(dynamic_shared()) + warp_id() * query_bytes + angles_offset;
    }

    // at: the first tile of the task, whose loads were started before.
    __device__ __forceinline__ void begin(const Arguments& a, const Task& task, const Tile& at) {
        if constexpr (rotates) rotate(a, task, at);
        else cp_async_wait<0>();
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
            peak[n][0] = peak[n][1] = negative_infinity();
            total[n][0] = total[n][1] = 0.0f;
#pragma unroll
            for (int c = 0; c < value_chunks; c++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    out[n][c][i][0] = out[n][c][i][1] = out[n][c][i][2] = out[n][c][i][3] = 0.0f;
        }
    }

    // Head 8n + g of the task, dims as in `keys`; zeros beyond the head's dims and for heads that do not exist.
    __device__ __forceinline__ void load_queries(const Arguments& a, const Task& task) {
        const T* q = a.row(task.request) + task.head(a) * HEAD_DIM;
        const int heads = task.heads(a);
#pragma unroll
        for (int c = 0; c < key_chunks; c++)
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) {
                const int head = 8 * n + g(), dim = 32 * c + 8 * t();
                cp_async_16(query_address(c, n), q + head * HEAD_DIM + dim, head < heads && dim < HEAD_DIM);
            }
        if constexpr (rotates) {
            const int half = HEAD_DIM / 2, i = 4 * lane_id();
            const float* angles = (i < half ? a.cos : a.sin) + static_cast<i64>(task.request) * half + i % half;
            if (i < HEAD_DIM) cp_async_16(angles_address() + i * sizeof(float), angles);
        }
        cp_async_commit();
    }

    // Of the pairs whose first channels are in chunk c.
    static __device__ __forceinline__ void load_angles(int c, float (&cos)[8], float (&sin)[8]) {
        const u32 address = angles_address() + (32 * c + 8 * t()) * sizeof(float);
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float part[2][4];
            unpack<float>(load_shared(address + i * sizeof(float)), part[0]);
            unpack<float>(load_shared(address + (HEAD_DIM / 2 + i) * sizeof(float)), part[1]);
#pragma unroll
            for (int j = 0; j < 4; j++) cos[i + j] = part[0][j], sin[i + j] = part[1][j];
        }
    }

    // Eight pairs of channels.
    static __device__ __forceinline__ void turn_chunks(uint4& x, uint4& y, const float (&cos)[8],
                                                       const float (&sin)[8]) {
        float first[8], second[8];
        unpack<T>(x, first);
        unpack<T>(y, second);
#pragma unroll
        for (int i = 0; i < 8; i++) turn(first[i], second[i], cos[i], sin[i]);
        x = pack<T>(first);
        y = pack<T>(second);
    }

    // Turns the queries and, if it is here, the new token's key, which goes into the cache with its value. A lane has
    // both channels of a pair, and the same pairs of all queries and of the key.
    __device__ __forceinline__ void rotate(const Arguments& a, const Task& task, const Tile& at) {
        constexpr int pairs = key_chunks / 2;
        const NewToken token(a, task);
        if (token.round == 0) load_new_token(token, task, at);
        cp_async_wait<0>();
        __syncwarp();
#pragma unroll
        for (int c = 0; c < pairs; c++) {
            float cos[8], sin[8];
            load_angles(c, cos, sin);
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) {
                const u32 first = query_address(c, n), second = query_address(c + pairs, n);
                uint4 query[2] = {load_shared(first), load_shared(second)};
                turn_chunks(query[0], query[1], cos, sin);
                store_shared(first, query[0]);
                store_shared(second, query[1]);
            }
        }
        if (token.is_here()) store_new_token(a, task, token);
    }

    // Of the tile that is on its way: the new token's row, with the key as it is, and the values of who takes that row
    // for another. (Other rows' keys have no effect.)
    __device__ __forceinline__ void load_new_token(const NewToken& token, const Task& task, const Tile& at) {
#pragma unroll
        for (int row = 0; row < 2; row++)
            if (8 * row + g() == token.row(task))
#pragma unroll
                for (int c = 0; c < key_chunks; c++) keys[c][row] = load_activation(token.key + 32 * c + 8 * t());
#pragma unroll
        for (int row = 0; row < 4; row++)
            if (at.nearest(value_row(row)) == token.row(task))
#pragma unroll
                for (int c = 0; c < value_chunks; c++) values[c][row] = load_activation(token.value + 64 * c + 8 * g());
    }

    __device__ __forceinline__ void store_new_token(const Arguments& a, const Task& task, const NewToken& token) {
        constexpr int pairs = key_chunks / 2;
        const int token_row = token.row(task);
        const bool is_loaded = token.round == 0, is_low = token_row < 8, is_mine = token_row % 8 == g();
        const Tile place = token.place(a, task);
#pragma unroll
        for (int c = 0; c < pairs; c++) {
            float cos[8], sin[8];
            load_angles(c, cos, sin);
            const int dims[2] = {32 * c + 8 * t(), 32 * (c + pairs) + 8 * t()};
            uint4 key[2];
#pragma unroll
            for (int i = 0; i < 2; i++)
                key[i] = is_loaded ? (is_low ? keys[c + i * pairs][0] : keys[c + i * pairs][1])
                                   : load_activation(token.key + dims[i]);
            turn_chunks(key[0], key[1], cos, sin);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (is_mine) store_vector(place.keys + dims[i], key[i]);
                if (is_mine && is_loaded && is_low) keys[c + i * pairs][0] = key[i];
                if (is_mine && is_loaded && !is_low) keys[c + i * pairs][1] = key[i];
            }
        }
        if (is_loaded) {
#pragma unroll
            for (int row = 0; row < 4; row++)
                if (value_row(row) == token_row)
#pragma unroll
                    for (int c = 0; c < value_chunks; c++)
                        store_vector(place.values + 64 * c + 8 * g(), values[c][row]);
        } else {
            const int dim = 8 * lane_id();
            if (dim < HEAD_DIM) store_vector(place.values + dim, load_activation(token.value + dim));
            __syncwarp();  // this warp reads the token's tile from the cache
        }
    }

    // Beyond the head's dims lanes read what their neighbours read; the queries are 0 there.
    __device__ __forceinline__ void load_keys(const Tile& at) {
#pragma unroll
        for (int row = 0; row < 2; row++)
#pragma unroll
            for (int c = 0; c < key_chunks; c++)
                keys[c][row] = load_cached(at.keys + at.offset(8 * row + g()) + min(32 * c + 8 * t(), HEAD_DIM - 8));
    }

    // As for keys; the products of repeated dims are not stored.
    __device__ __forceinline__ void load_values(const Tile& at) { load_values<0, early_chunks>(at); }
    __device__ __forceinline__ void load_late_values(const Tile& at) { load_values<early_chunks, value_chunks>(at); }
    template <int begin, int end> __device__ __forceinline__ void load_values(const Tile& at) {
#pragma unroll
        for (int row = 0; row < 4; row++)
#pragma unroll
            for (int c = begin; c < end; c++)
                values[c][row] =
                    load_cached(at.values + at.offset(value_row(row)) + min(64 * c + 8 * g(), HEAD_DIM - 8));
    }

    // A permutation of the dims that is the same for both operands leaves a product as it is: 4 consecutive dims of
    // a lane stand for dims 2t, 2t + 1, 2t + 8, 2t + 9 of an mma.
    __device__ __forceinline__ void multiply_keys(const Arguments&, int, int, int, int) {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
        for (int c = 0; c < key_chunks; c++)
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) {
                const uint4 q = load_shared(query_address(c, n));
                const uint4 low = keys[c][0], high = keys[c][1];
                mma_m16n8k16<T>(scores[n], low.x, high.x, low.y, high.y, q.x, q.y);
                mma_m16n8k16<T>(scores[n], low.z, high.z, low.w, high.w, q.z, q.w);
            }
    }

    // The scores of the tile that starts at token `start` become weights relative to the greatest score so far.
    __device__ __forceinline__ void softmax(const Arguments& a, int start, int first, int last) {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int token = start + g() + e / 2 * 8;
                scores[n][e] = token < first || token >= last ? negative_infinity() : exponent(a, scores[n][e]);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float highest = fmaxf(peak[n][h], fmaxf(scores[n][h], scores[n][h + 2]));
#pragma unroll
                for (int distance = 4; distance < warp_size; distance *= 2)
                    highest = fmaxf(highest, shuffle_xor(highest, distance));
                const float factor = weight_below(peak[n][h], highest);
                peak[n][h] = highest;
                scores[n][h] = weight_below(scores[n][h], highest);
                scores[n][h + 2] = weight_below(scores[n][h + 2], highest);
                total[n][h] = total[n][h] * factor + (scores[n][h] + scores[n][h + 2]);
#pragma unroll
                for (int c = 0; c < value_chunks; c++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        out[n][c][i][h] *= factor;
                        out[n][c][i][h + 2] *= factor;
                    }
            }
        }
    }

    __device__ __forceinline__ void multiply_values() {
        u32 weights[HEAD_TILES][2];
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
            weights[n][0] = transpose_8x8(pack2<T>(scores[n][0], scores[n][1]));
            weights[n][1] = transpose_8x8(pack2<T>(scores[n][2], scores[n][3]));
        }
#pragma unroll
        for (int c = 0; c < value_chunks; c++) {
            u32 words[4][4];
#pragma unroll
            for (int row = 0; row < 4; row++) {
                words[row][0] = values[c][row].x, words[row][1] = values[c][row].y;
                words[row][2] = values[c][row].z, words[row][3] = values[c][row].w;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Two tokens of one dim beside each other: the low halves of two words, and the high halves.
                const u32 a0 = __byte_perm(words[0][i], words[1][i], 0x5410);
                const u32 a1 = __byte_perm(words[0][i], words[1][i], 0x7632);
                const u32 a2 = __byte_perm(words[2][i], words[3][i], 0x5410);
                const u32 a3 = __byte_perm(words[2][i], words[3][i], 0x7632);
#pragma unroll
                for (int n = 0; n < HEAD_TILES; n++)
                    mma_m16n8k16<T>(out[n][c][i], a0, a1, a2, a3, weights[n][0], weights[n][1]);
            }
        }
    }

    __device__ __forceinline__ void store(int heads) const {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float sum = total[n][h];
#pragma unroll
                for (int distance = 4; distance < warp_size; distance *= 2) sum += shuffle_xor(sum, distance);
                const int head = 8 * n + 2 * t() + h;
                if (head >= heads) continue;
                if (g() == 0) *warp_stats(warp_id(), head) = make_float2(peak[n][h], sum);
                float* row = warp_row(warp_id(), head, heads);
#pragma unroll
                for (int c = 0; c < value_chunks; c++) {
                    if (64 * c + 8 * g() >= HEAD_DIM) continue;
#pragma unroll
                    for (int i = 0; i < 4; i += 2) {
                        const float(&low)[4] = out[n][c][i], (&high)[4] = out[n][c][i + 1];
                        *reinterpret_cast<float4*>(row + 64 * c + 8 * g() + 2 * i) =
                            make_float4(low[h], low[h + 2], high[h], high[h + 2]);
                    }
                }
            }
    }
};
