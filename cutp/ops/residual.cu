// Scaling and adding on the residual stream, and the last step of the logits. Specification: residual.py, and
// `_finish_logits` of distributed_transformer.py.
//
// Arrays of any shape, mostly seen as one row of elements; a thread takes those of one 16-byte vector.
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

// out[count] = logits / scaling as float, and then, if softcap is not 0, softcap * tanh(that / softcap). out may be
// logits of float. Exact divisions and the accurate tanh: the order of close logits decides which token is sampled.
extern "C" __global__ void __launch_bounds__(256)
finish_logits(const scalar_t* logits, float* out, i64 count, float scaling, float softcap) {
    const int here = elements_here(count);
    pdl_launch_dependents();
    pdl_wait();
    if (here == 0) return;
    float values[width];
    load_activations(logits + first_element(), here, values);
#pragma unroll
    for (int i = 0; i < width; i++) {
        values[i] = values[i] / scaling;
        if (softcap != 0.0f) values[i] = softcap * tanhf(values[i] / softcap);
    }
    // The counts are not clamped to 0 .. 4: sm_90 code of ptxas 13.0 for min(max()) == 4 was seen to go the wrong way.
#pragma unroll
    for (int i = 0; i < width; i += 4) {
        const float part[4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
        store_activations(out + first_element() + i, here - i, part);
    }
}
