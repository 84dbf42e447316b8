// The activations of the feed-forward layer, elementwise in float. Specification: activation.py.
#pragma once

// The numbers of activation_cuda.py.
enum Activation { SILU, GELU, GELU_TANH, RELU, TANH, SIGMOID };

// The exponential of a non-positive number only: no overflow at either end, and the divisor is between 1 and 2.
__device__ __forceinline__ float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x >= 0 ? 1.0f : e) * reciprocal_approx(1.0f + e);
}

template <Activation kind> __device__ __forceinline__ float activated(float x) {
    if constexpr (kind == SILU) return x * sigmoid(x);
    if constexpr (kind == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    if constexpr (kind == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * (x * x * x))));
    if constexpr (kind == RELU) return x < 0 ? 0.0f : x;  // NaN stays, as fmaxf would not have it
    if constexpr (kind == TANH) return tanhf(x);
    if constexpr (kind == SIGMOID) return sigmoid(x);
}

// Comparisons instead of fminf and fmaxf: a NaN must stay one. A limit of infinity clamps nothing.
__device__ __forceinline__ float clamped_gate(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamped_up(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }
