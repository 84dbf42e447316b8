// Rotary embedding of queries and keys and the write of keys and values into the paged cache, in one pass over the
// fused projection. Specification: apply_rotary in rotary.py, kv_write.py.
//
// blockIdx.x is the token; blockIdx.y and threadIdx.y are the head, counted through query, key and value heads as they
// lie in the projection; the threads along x stride over the head.
//
// PAIRS says which of a head's first R channels are turned together. HALVES: i and i + R/2, where R/2 is a multiple of
// 16 bytes (R = 0 turns nothing). INTERLEAVED: 2i and 2i + 1, where R is a multiple of 16 bytes. ANY: either of them,
// decided at run time, for every R, channel by channel.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32 PAIRS=HALVES,INTERLEAVED,ANY
#include "device.cuh"
#include "rotary.cuh"

enum Pairs { HALVES, INTERLEAVED, ANY };
constexpr Pairs pairs = PAIRS;
constexpr int width = vector_size<scalar_t>;

__device__ __forceinline__ int round_up(int channel) { return (channel + width - 1) / width * width; }

// The table's row of one token.
struct Angles {
    const float* cos;
    const float* sin;
};

// n angles from p on; 16 bytes a time where that is possible, and then p is a multiple of 16 bytes.
template <int n> __device__ __forceinline__ void load_angles(const float* p, float (&f)[n]) {
    if constexpr (n % 4 == 0) {
#pragma unroll
        for (int i = 0; i < n; i += 4) {
            float part[4];
            unpack<float>(load_activation(p + i), part);
#pragma unroll
            for (int j = 0; j < 4; j++) f[i + j] = part[j];
        }
    } else {
#pragma unroll
        for (int i = 0; i < n; i++) f[i] = load_activation_element(p + i);
    }
}

// The three layouts: out = in, turned, for channels 0 .. rotary_dim - 1 of a head.

__device__ __forceinline__ void rotate_halves(const scalar_t* in, scalar_t* out, Angles angles, int rotary_dim) {
    const int half = rotary_dim / 2;
    for (int i = threadIdx.x * width; i < half; i += blockDim.x * width) {
        float first[width], second[width], cos[width], sin[width];
        unpack<scalar_t>(load_activation(in + i), first);
        unpack<scalar_t>(load_activation(in + half + i), second);
        load_angles(angles.cos + i, cos);
        load_angles(angles.sin + i, sin);
#pragma unroll
        for (int j = 0; j < width; j++) turn(first[j], second[j], cos[j], sin[j]);
        store_vector(out + i, pack<scalar_t>(first));
        store_vector(out + half + i, pack<scalar_t>(second));
    }
}

__device__ __forceinline__ void rotate_interleaved(const scalar_t* in, scalar_t* out, Angles angles, int rotary_dim) {
    for (int i = threadIdx.x * width; i < rotary_dim; i += blockDim.x * width) {
        float x[width], cos[width / 2], sin[width / 2];
        unpack<scalar_t>(load_activation(in + i), x);
        load_angles(angles.cos + i / 2, cos);
        load_angles(angles.sin + i / 2, sin);
#pragma unroll
        for (int j = 0; j < width / 2; j++) turn(x[2 * j], x[2 * j + 1], cos[j], sin[j]);
        store_vector(out + i, pack<scalar_t>(x));
    }
}

__device__ __forceinline__ void rotate_any(const scalar_t* in, scalar_t* out, Angles angles, int rotary_dim,
                                           bool interleaved) {
    const int half = rotary_dim / 2;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
        float first = to_float(load_activation_element(in + a)), second = to_float(load_activation_element(in + b));
        turn(first, second, load_activation_element(angles.cos + i), load_activation_element(angles.sin + i));
        out[a] = from_float<scalar_t>(first);
        out[b] = from_float<scalar_t>(second);
    }
    // Whole vectors that are not turned are copied elsewhere.
    for (int i = rotary_dim + threadIdx.x; i < round_up(rotary_dim); i += blockDim.x)
        out[i] = load_activation_element(in + i);
}

// out = in for the whole vectors from channel `first` on.
__device__ __forceinline__ void copy_vectors(int first, const scalar_t* in, scalar_t* out, int head_dim) {
    for (int i = round_up(first) + threadIdx.x * width; i < head_dim; i += blockDim.x * width)
        store_vector(out + i, load_activation(in + i));
}

// Turns the q_heads + kv_heads first heads of qkv[T, q_heads + 2 * kv_heads, head_dim] by the angles of
// cos, sin[T, rotary_dim / 2]; queries go to q_out[T, q_heads, out_dim], keys and the values behind them to slot
// slots[T] of pages[P, 2, kv_heads, page_size, out_dim]. Behind the head_dim channels of a head are zeros. Tokens with a
// negative slot are padding: nothing is written.
extern "C" __global__ void __launch_bounds__(1024)
rotary_kv_write(const scalar_t* qkv, const float* cos, const float* sin, const i64* slots, scalar_t* q_out,
                scalar_t* pages, int q_heads, int kv_heads, int head_dim, int out_dim, int rotary_dim,
                int page_size, int interleaved) {
    const i64 token = blockIdx.x;
    const int heads = q_heads + 2 * kv_heads, head = blockIdx.y * blockDim.y + threadIdx.y;
    pdl_launch_dependents();
    pdl_wait();
    const i64 slot = load_activation_element(slots + token);
    if (slot < 0 || head >= heads) return;
    const scalar_t* in = qkv + (token * heads + head) * head_dim;
    scalar_t* out;
    if (head < q_heads) {
        out = q_out + (token * q_heads + head) * out_dim;
    } else {
        // Keys of all heads and then values of all heads, in a page as in the projection. Slots fit into 32 bits.
        const u32 page = static_cast<u32>(slot) / page_size, row = static_cast<u32>(slot) % page_size;
        const i64 plane = static_cast<i64>(page) * 2 * kv_heads + head - q_heads;
        out = pages + (plane * page_size + row) * out_dim;
    }
    const bool value = head >= q_heads + kv_heads;
    if (!value) {
        const Angles angles{cos + token * (rotary_dim / 2), sin + token * (rotary_dim / 2)};
        if constexpr (pairs == HALVES) rotate_halves(in, out, angles, rotary_dim);
        if constexpr (pairs == INTERLEAVED) rotate_interleaved(in, out, angles, rotary_dim);
        if constexpr (pairs == ANY) rotate_any(in, out, angles, rotary_dim, interleaved);
    }
    copy_vectors(value ? 0 : rotary_dim, in, out, head_dim);
    for (int i = head_dim + threadIdx.x * width; i < out_dim; i += blockDim.x * width)
        store_vector(out + i, make_uint4(0, 0, 0, 0));
}

// out[T, heads, head_dim] = the first head_dim channels of each head of x[T, heads, in_dim]. Grid: rows of threads that
// take a head each.
extern "C" __global__ void __launch_bounds__(1024)
narrow_heads(const scalar_t* x, scalar_t* out, int rows, int in_dim, int head_dim) {
    const i64 row = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    pdl_launch_dependents();
    pdl_wait();
    if (row >= rows) return;
    for (int i = threadIdx.x * width; i < head_dim; i += blockDim.x * width)
        store_vector(out + row * head_dim + i, load_activation(x + row * in_dim + i));
}
