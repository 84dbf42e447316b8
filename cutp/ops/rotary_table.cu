// cos and sin of the rotary angles of a batch of tokens, made once a pass. Specification: rotary_table in rotary.py.
//
// A row of threads (along x) takes a token, its threads stride over the frequencies.
//
// archs: sm_80 sm_90a sm_100
// variants: DTYPE=BF16,F16,F32
#include "device.cuh"

// cos_out, sin_out[n_tokens, n_frequencies] = f(position * inv_freq) * scaling, rounded to DTYPE but kept as float.
//
// request_of_token: null, or the row of inv_freq (frequency_stride apart; 0: one row for all) and the element of
// `scalings` that a token uses. scalings: null, or one a request, instead of `scaling`. Rows of tokens with a negative
// position or request are padding and are not written.
extern "C" __global__ void __launch_bounds__(256)
rotary_table(const i64* positions, const float* inv_freq, const i64* request_of_token, const float* scalings,
             float* cos_out, float* sin_out, int n_tokens, int n_frequencies, int frequency_stride, float scaling) {
    const i64 t = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    pdl_launch_dependents();
    pdl_wait();
    if (t >= n_tokens) return;
    const i64 position = load_activation_element(positions + t);
    const i64 request = request_of_token ? load_activation_element(request_of_token + t) : 0;
    if (position < 0 || request < 0) return;
    const float scale = scalings ? load_activation_element(scalings + request) : scaling;
    for (int i = threadIdx.x; i < n_frequencies; i += blockDim.x) {
        const float frequency = load_activation_element(inv_freq + request * frequency_stride + i);
        // One rounding here, as in the specification: fused into the range reduction, the product would have none.
        const float angle = __fmul_rn(static_cast<float>(position), frequency);
        float sine, cosine;
        sincosf(angle, &sine, &cosine);
        cos_out[t * n_frequencies + i] = rounded<scalar_t>(cosine * scale);
        sin_out[t * n_frequencies + i] = rounded<scalar_t>(sine * scale);
    }
}
