// Scaling and adding on the residual stream, and the last step of the logits. Specification: residual.py.
//
// Arrays of any shape, mostly seen as one row of elements; a thread takes those of one 16-byte vector, but in
// finish_logits.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32
#include "device.cuh"

constexpr int width = vector_size<scalar_t>;

// The elements of this thread: the first, and how many there are (0 for threads behind the end).
__device__ __forceinline__ i64 first_element() {
    return (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * width;
}
__device__ __forceinline__ int elements_here(i64 count) {
    return max(min(count - first_element(), static_cast<i64>(width)), static_cast<i64>(0));
}

// out[count] = x * factor; out may be x.
extern "C" __global__ void __launch_bounds__(256)
scale(const scalar_t* x, scalar_t* out, i64 count, float factor) {
    const int here = elements_here(count);
    pdl_launch_dependents();
    pdl_wait();
    if (here == 0) return;
    float values[width];
    load_activations(x + first_element(), here, values);
#pragma unroll
    for (int i = 0; i < width; i++) values[i] *= factor;
    store_activations(out + first_element(), here, values);
}

// out[count] = x clamped to [-limit, limit]; NaN stays. out may be x.
extern "C" __global__ void __launch_bounds__(256)
clip(const scalar_t* x, scalar_t* out, i64 count, float limit) {
    const int here = elements_here(count);
    pdl_launch_dependents();
    pdl_wait();
    if (here == 0) return;
    float values[width];
    load_activations(x + first_element(), here, values);
#pragma unroll
    for (int i = 0; i < width; i++)
        values[i] = values[i] > limit ? limit : values[i] < -limit ? -limit : values[i];
    store_activations(out + first_element(), here, values);
}

// out[rows, dim] = x * shares[rows], rounded; out may be x. Grid: rows, blocks of a row.
extern "C" __global__ void __launch_bounds__(256)
scale_rows(const scalar_t* x, const scalar_t* shares, scalar_t* out, int dim) {
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * width;
    pdl_launch_dependents();
    pdl_wait();
    if (column >= dim) return;
    const i64 first = static_cast<i64>(blockIdx.x) * dim + column;
    const float share = to_float(load_activation_element(shares + blockIdx.x));
    float values[width];
    unpack<scalar_t>(load_activation(x + first), values);
#pragma unroll
    for (int i = 0; i < width; i++) values[i] *= share;
    store_vector(out + first, pack<scalar_t>(values));
}

// out[count] = x + y * multiplier, the product rounded before the sum; out may be x or y.
extern "C" __global__ void __launch_bounds__(256)
residual_add(const scalar_t* x, const scalar_t* y, scalar_t* out, i64 count, float multiplier) {
    const int here = elements_here(count);
    pdl_launch_dependents();
    pdl_wait();
    if (here == 0) return;
    float sum[width], addend[width];
    load_activations(x + first_element(), here, sum);
    load_activations(y + first_element(), here, addend);
    // For float the product's rounding is the multiplication's own, which must not be fused with the sum.
#pragma unroll
    for (int i = 0; i < width; i++) sum[i] += rounded<scalar_t>(__fmul_rn(addend[i], multiplier));
    store_activations(out + first_element(), here, sum);
}

// What finish_logits reads and writes at once: as many elements as there are floats in one store, so that neighbouring
// threads write neighbouring bytes.
constexpr int quad = vector_size<float>;
constexpr int quads_in_flight = 2;  // that a thread loads before it works on them

template <class T> union Quad {
    uint4 vector;  // of floats
    u64 word;      // of elements of 16 bits
    T elements[quad];
};

template <class T> __device__ __forceinline__ Quad<T> load_quad(const T* p) {
    Quad<T> q;
    if constexpr (same_type<T, float>) q.vector = load_activation(p);
    else q.word = load_activation_element(reinterpret_cast<const u64*>(p));
    return q;
}

// Exact divisions and the accurate tanh: the order of close logits decides which token is sampled.
__device__ __forceinline__ float finished(float logit, float scaling, float softcap) {
    if (scaling != 1.0f) logit = logit / scaling;
    return softcap != 0.0f ? softcap * tanhf(logit / softcap) : logit;
}

// out[count] = logits / scaling as float, and then, if softcap is not 0, softcap * tanh(that / softcap). out may be
// logits of float. A block takes quads_in_flight quads for each of its threads.
extern "C" __global__ void __launch_bounds__(256)
finish_logits(const scalar_t* logits, float* out, i64 count, float scaling, float softcap) {
    const i64 first = (static_cast<i64>(blockIdx.x) * quads_in_flight * blockDim.x + threadIdx.x) * quad;
    const i64 step = static_cast<i64>(blockDim.x) * quad;
    pdl_launch_dependents();
    pdl_wait();
    Quad<scalar_t> quads[quads_in_flight];
#pragma unroll
    for (int i = 0; i < quads_in_flight; i++)
        if (first + i * step + quad <= count) quads[i] = load_quad(logits + first + i * step);
#pragma unroll
    for (int i = 0; i < quads_in_flight; i++) {
        if (first + i * step + quad > count) break;
        float values[quad];
#pragma unroll
        for (int j = 0; j < quad; j++) values[j] = finished(to_float(quads[i].elements[j]), scaling, softcap);
        store_vector(out + first + i * step, pack<float>(values));
    }
    // Less than a quad is left at the end of the array.
    const int left = static_cast<int>(count % quad);
    if (blockIdx.x != 0 || threadIdx.x >= left) return;
    const i64 last = count - left + threadIdx.x;
    out[last] = finished(to_float(load_activation_element(logits + last)), scaling, softcap);
}
