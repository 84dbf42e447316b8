// Penalties and logit bias on vocabulary shards. Specification: penalties.py.
//
// archs: sm_80 sm_90a sm_100
#include "device.cuh"
#include "vocab_rows.cuh"

constexpr int prompt_flag = 1 << 30;

__device__ __forceinline__ int slot_of(const int* slots, int i) {
    return slots ? load_activation_element(slots + i) : i;
}

__device__ __forceinline__ float penalised(float x, int count, float repetition, float presence, float frequency) {
    const int generated = count & (prompt_flag - 1);
    x = x < 0 ? __fmul_rn(x, repetition) : __fdiv_rn(x, repetition);
    x = __fsub_rn(x, __fmul_rn(frequency, static_cast<float>(generated)));
    return generated ? __fsub_rn(x, presence) : x;
}

// Changes logits[row][columns] where the row's counts are not 0; counts[slot][columns]. Grid: blocks of a row, rows.
extern "C" __global__ void __launch_bounds__(block_threads)
apply_penalties(float* logits, const int* counts, const int* slots, const float* repetition, const float* presence,
                const float* frequency, int columns) {
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.y, slot = slot_of(slots, row);
    if (slot < 0) return;
    const float r = load_activation_element(repetition + row), p = load_activation_element(presence + row),
                f = load_activation_element(frequency + row);
    if (r == 1.0f && p == 0.0f && f == 0.0f) return;
    float* x = row_of(logits, row, columns);
    for_each_group(row_of(counts, slot, columns), columns, 0, 0, [&](int column, const int (&count)[width]) {
#pragma unroll
        for (int j = 0; j < width; j++)
            if (count[j]) x[column + j] = penalised(load_activation_element(x + column + j), count[j], r, p, f);
    });
}

// logits[row][id] += value for the row's list of `per_row` ids that differ from each other; a negative id is none.
extern "C" __global__ void __launch_bounds__(block_threads)
add_logit_bias(float* logits, const int* ids, const float* values, int per_row, int columns, i64 vocab_start) {
    pdl_launch_dependents();
    pdl_wait();
    float* x = row_of(logits, blockIdx.x, columns);
    for (int i = threadIdx.x; i < per_row; i += block_threads) {
        const i64 entry = static_cast<i64>(blockIdx.x) * per_row + i;
        const i64 column = load_activation_element(ids + entry) - vocab_start;
        if (column >= 0 && column < columns)
            x[column] = __fadd_rn(load_activation_element(x + column), load_activation_element(values + entry));
    }
}

// counts[slot of i][token i] += 1, or, where in_prompt, marks the token as one of the prompt.
extern "C" __global__ void __launch_bounds__(block_threads)
count_tokens(int* counts, const int* slots, const i64* tokens, int n_tokens, int columns, i64 vocab_start,
             int in_prompt) {
    pdl_launch_dependents();
    pdl_wait();
    const int i = blockIdx.x * block_threads + threadIdx.x;
    if (i >= n_tokens) return;
    const int slot = slot_of(slots, i);
    const i64 column = load_activation_element(tokens + i) - vocab_start;
    if (slot < 0 || column < 0 || column >= columns) return;
    int* count = row_of(counts, slot, columns) + column;
    if (in_prompt) atomicOr(count, prompt_flag);
    else atomicAdd(count, 1);
}
