// Multi-head latent attention around its products, for every size: rotation and write of the latents, and attention in
// the absorbed form. Specifications: rotary.py, kv_write.py, latent_attention.py.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32
#include "device.cuh"

constexpr int width = vector_size<scalar_t>;

// The products are rounded before they are added.
__device__ __forceinline__ float turned(float a, float b, float cos, float sin) {
    return rounded<scalar_t>(__fmul_rn(a, cos)) + rounded<scalar_t>(__fmul_rn(b, sin));
}

// out = in, turned; a warp. cos, sin: of rope_dim / 2 pairs, (i, i + rope_dim / 2) or (2i, 2i + 1).
__device__ __forceinline__ void rotate(const scalar_t* in, scalar_t* out, const float* cos, const float* sin,
                                       int rope_dim, bool interleaved) {
    for (int i = lane_id(); i < rope_dim / 2; i += warp_size) {
        const int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + rope_dim / 2;
        const float first = to_float(load_activation_element(in + a)), second = to_float(load_activation_element(in + b));
        const float c = load_activation_element(cos + i), s = load_activation_element(sin + i);
        out[a] = from_float<scalar_t>(turned(first, -second, c, s));
        out[b] = from_float<scalar_t>(turned(second, first, c, s));
    }
}

// Of each token: its latent[T, rank] and behind it the rotated key, the channels from `rank` on of compressed[T, rank +
// rope_dim], go to slot slots[T] of pages[P, page_size, rank + rope_dim]. The channels from nope_dim on of its queries
// q[T, heads, nope_dim + rope_dim] are turned and go to those from `rank` on of q_out[T, heads, rank + rope_dim].
// Tokens with a negative slot are padding: nothing is written. Grid: tokens, rows of warps that take a head each, or the
// latent.
extern "C" __global__ void __launch_bounds__(128)
latent_rotary_write(const scalar_t* compressed, const scalar_t* latent, const scalar_t* q, const float* cos,
                    const float* sin, const i64* slots, scalar_t* pages, scalar_t* q_out, int heads, int rank,
                    int nope_dim, int rope_dim, int interleaved) {
    const i64 token = blockIdx.x;
    const int head = blockIdx.y * (blockDim.x / warp_size) + warp_id();
    pdl_wait();
    pdl_launch_dependents();
    const i64 slot = load_activation_element(slots + token);
    if (slot < 0 || head > heads) return;
    cos += token * (rope_dim / 2), sin += token * (rope_dim / 2);
    const int channels = rank + rope_dim;
    if (head < heads) {
        const i64 row = token * heads + head;
        rotate(q + row * (nope_dim + rope_dim) + nope_dim, q_out + row * channels + rank, cos, sin, rope_dim,
               interleaved != 0);
        return;
    }
    scalar_t* out = pages + slot * channels;
    for (int i = lane_id(); i < rank; i += warp_size) out[i] = load_activation_element(latent + token * rank + i);
    rotate(compressed + token * channels + rank, out + rank, cos, sin, rope_dim, interleaved != 0);
}

// ---- attention, a warp for each row of queries

constexpr int most_vectors = same_type<scalar_t, float> ? 5 : 3;  // of a lane
constexpr int keys_at_once = 2;

__device__ __forceinline__ int vector_index(int i) { return i * warp_size + lane_id(); }

// out[T, heads, value_dim] = attention of q[T, heads, channels] over the first lengths[T] latents of a request, which are
// the keys, and with their first value_dim channels the values. Row t belongs to request table_rows[t], or t where that
// is null; its pages are that row of lookup_table[.., max_pages]. Grid: tokens, rows of warps that take a head each.
extern "C" __global__ void __launch_bounds__(128)
latent_attention(const scalar_t* q, const scalar_t* pages, const int* lookup_table, const i64* table_rows,
                 const int* lengths, scalar_t* out, int heads, int channels, int value_dim, int max_pages,
                 int page_size, float exponent_factor) {
    const i64 token = blockIdx.x;
    const int head = blockIdx.y * (blockDim.x / warp_size) + warp_id();
    pdl_wait();
    pdl_launch_dependents();
    if (head >= heads) return;
    const i64 request = table_rows == nullptr ? token : load_activation_element(table_rows + token);
    const int length = load_activation_element(lengths + token), vectors = channels / width;
    const int* table = lookup_table + request * max_pages;
    float query[most_vectors][width], sums[most_vectors][width] = {};
#pragma unroll
    for (int i = 0; i < most_vectors; i++)
        unpack<scalar_t>(load_activation_if(vector_index(i) < vectors,
                                            q + (token * heads + head) * channels + vector_index(i) * width), query[i]);
    float peak = negative_infinity(), total = 0.0f;
    for (int first = 0; first < length; first += keys_at_once) {
        float keys[keys_at_once][most_vectors][width], scores[keys_at_once];
        float new_peak = peak;
#pragma unroll
        for (int n = 0; n < keys_at_once; n++) {
            const int key = min(first + n, length - 1);
            const i64 page = load_activation_element(table + key / page_size);
            const scalar_t* p = pages + (page * page_size + key % page_size) * channels;
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < most_vectors; i++) {
                unpack<scalar_t>(load_activation_if(vector_index(i) < vectors, p + vector_index(i) * width), keys[n][i]);
#pragma unroll
                for (int j = 0; j < width; j++) score += query[i][j] * keys[n][i][j];
            }
            score = warp_sum(score) * exponent_factor;
            scores[n] = first + n < length ? score : negative_infinity();
            new_peak = fmaxf(new_peak, scores[n]);
        }
        const float shrunk = exp2f(peak - new_peak);
        total *= shrunk;
        float shares[keys_at_once];
#pragma unroll
        for (int n = 0; n < keys_at_once; n++) total += shares[n] = exp2f(scores[n] - new_peak);
#pragma unroll
        for (int i = 0; i < most_vectors; i++)
#pragma unroll
            for (int j = 0; j < width; j++) {
                float sum = sums[i][j] * shrunk;
#pragma unroll
                for (int n = 0; n < keys_at_once; n++) sum += shares[n] * keys[n][i][j];
                sums[i][j] = sum;
            }
        peak = new_peak;
    }
    const float factor = length > 0 ? 1.0f / total : 0.0f;
#pragma unroll
    for (int i = 0; i < most_vectors; i++) {
        if (vector_index(i) * width >= value_dim) continue;
#pragma unroll
        for (int j = 0; j < width; j++) sums[i][j] *= factor;
        store_vector(out + (token * heads + head) * value_dim + vector_index(i) * width, pack<scalar_t>(sums[i]));
    }
}
