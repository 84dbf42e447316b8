// Rows of prefill_attention.cu in plain float, which keeps all bits: 16 threads share 4 rows; a thread has the keys at
// its place + 16 j, and the vectors of the head dimension at its place + 16 j.
#pragma once

template <class T> struct FloatRows {
    static constexpr int own_rows = 4, sharers = 16;
    static constexpr int own_keys = key_block / sharers, own_vectors = (HEAD_DIM / 4 + sharers - 1) / sharers;

    float weighted[own_rows][own_vectors][4];
    float scores[own_rows][own_keys];
    float peaks[own_rows], totals[own_rows];

    __device__ __forceinline__ static int place() { return threadIdx.x % sharers; }
    __device__ __forceinline__ static int row(int i) { return threadIdx.x / sharers * own_rows + i; }
    __device__ __forceinline__ static bool has_vector(int j) { return place() + j * sharers < HEAD_DIM / 4; }

    __device__ __forceinline__ static float largest(float v) {
#pragma unroll
        for (int distance = sharers / 2; distance > 0; distance /= 2) v = fmaxf(v, shuffle_xor(v, distance));
        return v;
    }
    __device__ __forceinline__ static float summed(float v) {
#pragma unroll
        for (int distance = sharers / 2; distance > 0; distance /= 2) v += shuffle_xor(v, distance);
        return v;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < own_rows; i++) {
            peaks[i] = negative_infinity();
            totals[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < own_vectors; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] = 0.0f;
        }
    }

    __device__ __forceinline__ void multiply_keys(u32 queries, u32 keys) {
#pragma unroll
        for (int i = 0; i < own_rows; i++)
#pragma unroll
            for (int j = 0; j < own_keys; j++) scores[i][j] = 0.0f;
#pragma unroll 2
        for (int d = 0; d < HEAD_DIM / 4; d++) {
            float k[own_keys][4];
#pragma unroll
            for (int j = 0; j < own_keys; j++)
                unpack<T>(load_shared(keys + (place() + j * sharers) * row_bytes + d * 16), k[j]);
#pragma unroll
            for (int i = 0; i < own_rows; i++) {
                float q[4];
                unpack<T>(load_shared(queries + row(i) * row_bytes + d * 16), q);
#pragma unroll
                for (int j = 0; j < own_keys; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) scores[i][j] = fmaf(q[e], k[j][e], scores[i][j]);
            }
        }
    }

    __device__ __forceinline__ void cap_scores(const Problem& p) {
#pragma unroll
        for (int i = 0; i < own_rows; i++)
#pragma unroll
            for (int j = 0; j < own_keys; j++) scores[i][j] = soft_capped(scores[i][j] * p.score_factor, p.softcap);
    }

    __device__ __forceinline__ void mask(const RowTable& table, int first_key, int window) {
#pragma unroll
        for (int i = 0; i < own_rows; i++)
#pragma unroll
            for (int j = 0; j < own_keys; j++)
                if (!sees(table.position[row(i)], first_key + place() + j * sharers, window))
                    scores[i][j] = negative_infinity();
    }

    __device__ __forceinline__ void scores_to_weights(float exponent_factor) {
#pragma unroll
        for (int i = 0; i < own_rows; i++) {
            float greatest = negative_infinity();
#pragma unroll
            for (int j = 0; j < own_keys; j++) greatest = fmaxf(greatest, scores[i][j]);
            float base, sum = 0.0f;
            const float factor = raise_peak(peaks[i], largest(greatest) * exponent_factor, base);
#pragma unroll
            for (int j = 0; j < own_keys; j++) {
                scores[i][j] = exp2_approx(fmaf(scores[i][j], exponent_factor, -base));
                sum += scores[i][j];
            }
            totals[i] = fmaf(totals[i], factor, sum);
#pragma unroll
            for (int j = 0; j < own_vectors; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] *= factor;
        }
    }

    // Every thread needs the weights of all keys: they pass through shared memory, within the warp.
    __device__ __forceinline__ void multiply_values(u32 values, unsigned char* weights) {
#pragma unroll
        for (int i = 0; i < own_rows; i++)
#pragma unroll
            for (int j = 0; j < own_keys; j++)
                reinterpret_cast<float*>(weights + row(i) * probability_bytes)[place() + j * sharers] = scores[i][j];
        __syncwarp();
#pragma unroll 2
        for (int k = 0; k < key_block; k += 4) {
            float weight[own_rows][4];
#pragma unroll
            for (int i = 0; i < own_rows; i++)
                unpack<T>(load_shared(shared_address(weights) + row(i) * probability_bytes + k * 4), weight[i]);
#pragma unroll
            for (int e = 0; e < 4; e++) add_value(values + (k + e) * row_bytes, weight, e);
        }
    }

    __device__ __forceinline__ void add_value(u32 value_row, const float (&weight)[own_rows][4], int key) {
#pragma unroll
        for (int j = 0; j < own_vectors; j++) {
            if (!has_vector(j)) continue;
            float value[4];
            unpack<T>(load_shared(value_row + (place() + j * sharers) * 16), value);
#pragma unroll
            for (int i = 0; i < own_rows; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    weighted[i][j][e] = fmaf(weight[i][key], value[e], weighted[i][j][e]);
        }
    }

    __device__ __forceinline__ void store(const Problem& p, const Work& w, const RowTable& table, unsigned char*) {
#pragma unroll
        for (int i = 0; i < own_rows; i++) {
            const float total = summed(totals[i]);
            const int position = table.position[row(i)], head = table.head[row(i)];
            if (position < 0) continue;
            const float factor = reciprocal_total(total, peaks[i], p.sinks, head);
            const i64 to = static_cast<i64>(position + w.row_minus_position) * p.n_heads + head;
#pragma unroll
            for (int j = 0; j < own_vectors; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) weighted[i][j][e] *= factor;
                if (has_vector(j))
                    store_vector(p.out + to * HEAD_DIM + (place() + j * sharers) * width, pack<T>(weighted[i][j]));
            }
        }
    }
};
