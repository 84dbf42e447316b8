// Activations of the feed-forward layer, alone and gated. Specification: activation.py.
//
// A thread computes the elements of one 16-byte vector of the result. Which function it is, is decided at run time: the
// branch is the same for the whole grid.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32
#include "device.cuh"
#include "activation.cuh"

constexpr int width = vector_size<scalar_t>;

template <Activation kind> __device__ __forceinline__ void activate_all(float (&x)[width]) {
#pragma unroll
    for (int i = 0; i < width; i++) x[i] = activated<kind>(x[i]);
}

__device__ __forceinline__ void activate(int kind, float (&x)[width]) {
    switch (kind) {
    case SILU: return activate_all<SILU>(x);
    case GELU: return activate_all<GELU>(x);
    case GELU_TANH: return activate_all<GELU_TANH>(x);
    case RELU: return activate_all<RELU>(x);
    case TANH: return activate_all<TANH>(x);
    case SIGMOID: return activate_all<SIGMOID>(x);
    }
}

// out[count] = act(x[count]); out may be x.
extern "C" __global__ void __launch_bounds__(256)
activation(const scalar_t* x, scalar_t* out, i64 count, int kind) {
    const i64 first = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * width;
    pdl_launch_dependents();
    pdl_wait();
    if (first >= count) return;
    const int here = min(count - first, static_cast<i64>(width));
    float values[width];
    load_activations(x + first, here, values);
    activate(kind, values);
    store_activations(out + first, here, values);
}

// This thread's vectors of gate and up of row blockIdx.x, where gate_up[rows, 2 * columns] has the gate in its first
// columns. gate is clamped to at most `limit` and up to [-limit, limit]: infinity clamps nothing.
struct GateUp {
    float gate[width], up[width];

    __device__ __forceinline__ GateUp(const scalar_t* gate_up, int first, int columns, float limit) {
        const scalar_t* in = gate_up + static_cast<i64>(blockIdx.x) * 2 * columns + first;
        const uint4 gate_vector = load_activation(in), up_vector = load_activation(in + columns);
        unpack<scalar_t>(gate_vector, gate);
        unpack<scalar_t>(up_vector, up);
#pragma unroll
        for (int i = 0; i < width; i++) {
            gate[i] = clamped_gate(gate[i], limit);
            up[i] = clamped_up(up[i], limit);
        }
    }
};

__device__ __forceinline__ int first_column() { return (blockIdx.y * blockDim.x + threadIdx.x) * width; }

// out[rows, columns] = round(act(gate)) * up.
extern "C" __global__ void __launch_bounds__(256)
gated_activation(const scalar_t* gate_up, scalar_t* out, int columns, int kind, float limit) {
    pdl_launch_dependents();
    pdl_wait();
    const int first = first_column();
    if (first >= columns) return;
    GateUp v(gate_up, first, columns, limit);
    activate(kind, v.gate);
#pragma unroll
    for (int i = 0; i < width; i++) v.gate[i] = rounded<scalar_t>(v.gate[i]) * v.up[i];
    store_vector(out + static_cast<i64>(blockIdx.x) * columns + first, pack<scalar_t>(v.gate));
}

// out[rows, columns] = gate * sigmoid(alpha * gate) * (up + 1), every step rounded.
extern "C" __global__ void __launch_bounds__(256)
clamped_swiglu(const scalar_t* gate_up, scalar_t* out, int columns, float alpha, float limit) {
    pdl_launch_dependents();
    pdl_wait();
    const int first = first_column();
    if (first >= columns) return;
    GateUp v(gate_up, first, columns, limit);
#pragma unroll
    for (int i = 0; i < width; i++) {
        const float share = rounded<scalar_t>(sigmoid(rounded<scalar_t>(v.gate[i] * alpha)));
        v.gate[i] = rounded<scalar_t>(v.up[i] + 1.0f) * rounded<scalar_t>(v.gate[i] * share);
    }
    store_vector(out + static_cast<i64>(blockIdx.x) * columns + first, pack<scalar_t>(v.gate));
}
