// What a warp of decode_attention.cu computes in float32. No tensor cores keep its precision: lanes share the dims of a
// row, a few tokens at a time. All work is in multiply_keys, which knows the tile before the next one replaces it.
#pragma once

struct FloatAttention {
    static constexpr int step = 4 / columns;  // tokens whose loads are under way together

    float q[max_heads][columns][4], out[max_heads][columns][4];
    float peak[max_heads], total[max_heads];
    Tile at;

    static __device__ __forceinline__ int dim(int i) { return (i * warp_size + lane_id()) * 4; }

    __device__ __forceinline__ void load_row(const scalar_t* p, float (&row)[columns][4]) {
#pragma unroll
        for (int i = 0; i < columns; i++)
            unpack<float>(dim(i) < HEAD_DIM ? load_activation(p + dim(i)) : make_uint4(0, 0, 0, 0), row[i]);
    }

    __device__ __forceinline__ void begin(const Arguments& a, const Task& task, const Tile&) {
        const scalar_t* heads = a.row(task.request) + task.head(a) * HEAD_DIM;
#pragma unroll
        for (int h = 0; h < max_heads; h++) {
            peak[h] = negative_infinity();
            total[h] = 0.0f;
            if (h < task.heads(a)) load_row(heads + h * HEAD_DIM, q[h]);
#pragma unroll
            for (int i = 0; i < columns; i++) out[h][i][0] = out[h][i][1] = out[h][i][2] = out[h][i][3] = 0.0f;
        }
        if constexpr (rotates) turn_rows(a, task);
    }

    // Turns the queries and, if it is here, the new token's key, which goes into the cache with its value.
    __device__ __forceinline__ void turn_rows(const Arguments& a, const Task& task) {
        const i64 angles = static_cast<i64>(task.request) * (HEAD_DIM / 2) + dim(0) % (HEAD_DIM / 2);
        const NewToken token(a, task);
        float cos[4], sin[4], key[columns][4], value[columns][4];
        unpack<float>(load_activation(a.cos + angles), cos);
        unpack<float>(load_activation(a.sin + angles), sin);
        if (token.is_here()) {
            load_row(token.key, key);
            load_row(token.value, value);
        }
#pragma unroll
        for (int h = 0; h < max_heads; h++)
            if (h < task.heads(a)) turn_row(q[h][0], cos, sin);
        if (!token.is_here()) return;
        turn_row(key[0], cos, sin);
        const Tile place = token.place(a, task);
        if (dim(0) < HEAD_DIM) {
            store_vector(place.keys + dim(0), pack<float>(key[0]));
            store_vector(place.values + dim(0), pack<float>(value[0]));
        }
        __syncwarp();  // it is read from the cache by this warp
    }

    // The other channel of a pair is another lane's.
    static __device__ __forceinline__ void turn_row(float (&x)[4], const float (&cos)[4], const float (&sin)[4]) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float other = shuffle_xor(x[e], HEAD_DIM / 8);
            const bool is_first = dim(0) < HEAD_DIM / 2;
            float first = is_first ? x[e] : other, second = is_first ? other : x[e];
            turn(first, second, cos[e], sin[e]);
            x[e] = is_first ? first : second;
        }
    }

    __device__ __forceinline__ void load_queries(const Arguments&, const Task&) {}
    __device__ __forceinline__ void load_keys(const Tile& next) { at = next; }
    __device__ __forceinline__ void load_values(const Tile&) {}
    __device__ __forceinline__ void load_late_values(const Tile&) {}
    __device__ __forceinline__ void softmax(const Arguments&, int, int, int) {}
    __device__ __forceinline__ void multiply_values() {}

    __device__ __forceinline__ void multiply_keys(const Arguments& a, int start, int first, int last, int n_heads) {
#pragma unroll 1
        for (int row = 0; row < tile; row += step) {
            if (start + row + step <= first || start + row >= last) continue;
            float keys[step][columns][4], values[step][columns][4];
#pragma unroll
            for (int j = 0; j < step; j++) {
                load_row(at.keys + at.offset(row + j), keys[j]);
                load_row(at.values + at.offset(row + j), values[j]);
            }
#pragma unroll
            for (int h = 0; h < max_heads; h++)
                if (h < n_heads) add_tokens(a, h, start + row, first, last, keys, values);
        }
    }

    __device__ __forceinline__ void add_tokens(const Arguments& a, int h, int start, int first, int last,
                                               const float (&keys)[step][columns][4],
                                               const float (&values)[step][columns][4]) {
        float weights[step], highest = peak[h];
#pragma unroll
        for (int j = 0; j < step; j++) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < columns; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) dot = fmaf(q[h][i][e], keys[j][i][e], dot);
            dot = warp_sum(dot);
            weights[j] = start + j < first || start + j >= last ? negative_infinity() : exponent(a, dot);
            highest = fmaxf(highest, weights[j]);
        }
        const float factor = weight_below(peak[h], highest);
        peak[h] = highest;
        total[h] *= factor;
#pragma unroll
        for (int i = 0; i < columns; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) out[h][i][e] *= factor;
#pragma unroll
        for (int j = 0; j < step; j++) {
            const float weight = weight_below(weights[j], highest);
            total[h] += weight;
#pragma unroll
            for (int i = 0; i < columns; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[h][i][e] = fmaf(weight, values[j][i][e], out[h][i][e]);
        }
    }

    __device__ __forceinline__ void store(int n_heads) const {
#pragma unroll
        for (int h = 0; h < max_heads; h++) {
            if (h >= n_heads) continue;
            if (lane_id() == 0) *warp_stats(warp_id(), h) = make_float2(peak[h], total[h]);
            float* row = warp_row(warp_id(), h, n_heads);
#pragma unroll
            for (int i = 0; i < columns; i++)
                if (dim(i) < HEAD_DIM)
                    *reinterpret_cast<float4*>(row + dim(i)) =
                        make_float4(out[h][i][0], out[h][i][1], out[h][i][2], out[h][i][3]);
        }
    }
};
