// What a captured step of decoding begins and ends with. Specification: decode_rows.py.
//
// archs: sm_80 sm_90a sm_100
#include "device.cuh"

constexpr int block_threads = 256;

// Rows with a negative temperature are not in use. table: a row of it every `table_stride` elements. A thread a row.
extern "C" __global__ void __launch_bounds__(block_threads)
advance_rows(i64* lengths, const float* temperature, const int* table, i64* positions, i64* slots, int* kv_lengths,
             int rows, i64 table_stride, int page_size) {
    const int row = blockIdx.x * block_threads + threadIdx.x;
    pdl_launch_dependents();
    pdl_wait();
    if (row >= rows) return;
    const bool in_use = !(load_activation_element(temperature + row) < 0.0f);
    if (!in_use) {
        positions[row] = 0, slots[row] = -1, kv_lengths[row] = 0;
        return;
    }
    const i64 position = load_activation_element(lengths + row), page = position / page_size;
    const i64 page_number = load_activation_element(table + row * table_stride + page);
    lengths[row] = position + 1;
    positions[row] = position;
    slots[row] = page_number * page_size + (position - page * page_size);
    kv_lengths[row] = static_cast<int>(position + 1);
}

// published: two times `stride` elements, which may lie in the host's memory. One block.
extern "C" __global__ void __launch_bounds__(block_threads)
publish_tokens(const i64* tokens, int* turn, i64* published, int rows, int stride) {
    pdl_launch_dependents();
    pdl_wait();
    const int now = load_activation_element(turn);
    for (int row = threadIdx.x; row < rows; row += block_threads)
        published[now * static_cast<i64>(stride) + row] = load_activation_element(tokens + row);
    __syncthreads();  // all threads know whose turn it was
    if (threadIdx.x == 0) *turn = 1 - now;
}
