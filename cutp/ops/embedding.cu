// Gather of embedding rows from one rank's slice of the vocabulary. Specification: embedding.py.
//
// Rows are copied as bytes, whatever their dtype. Long rows take a block each, short ones a warp (blockDim.y rows per
// block); neighbouring threads copy neighbouring 16 bytes.
//
// archs: sm_80 sm_90a sm_100
#include "device.cuh"

template <class Token>
__device__ __forceinline__ void gather(const Token* tokens, const uint4* table, uint4* out, int n_tokens,
                                       i64 vocab_start, i64 n_rows, int row_vectors) {
    const i64 t = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    // The row to load depends on the token, which is an activation: no weight can be loaded ahead.
    pdl_launch_dependents();
    pdl_wait();
    if (t >= n_tokens) return;
    const i64 row = static_cast<i64>(load_activation_element(tokens + t)) - vocab_start;
    const bool owned = row >= 0 && row < n_rows;
    for (int i = threadIdx.x; i < row_vectors; i += blockDim.x)
        store_vector(out + t * row_vectors + i, owned ? load_weight(table + row * row_vectors + i)
                                                      : make_uint4(0, 0, 0, 0));
}

// out[n_tokens] = table[tokens - vocab_start], zeros for tokens outside the n_rows of this rank (padded rows, with a
// negative token, among them). A row is row_vectors times 16 bytes.
extern "C" __global__ void __launch_bounds__(1024)
embedding_int32(const int* tokens, const uint4* table, uint4* out, int n_tokens, i64 vocab_start, i64 n_rows,
                int row_vectors) {
    gather(tokens, table, out, n_tokens, vocab_start, n_rows, row_vectors);
}

extern "C" __global__ void __launch_bounds__(1024)
embedding_int64(const i64* tokens, const uint4* table, uint4* out, int n_tokens, i64 vocab_start, i64 n_rows,
                int row_vectors) {
    gather(tokens, table, out, n_tokens, vocab_start, n_rows, row_vectors);
}
