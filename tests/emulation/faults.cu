// Kernels that do something wrong, each in one way. They are for the emulation only.
#include "../../cutp/ops/device.cuh"

extern "C" __global__ void read_at(const float* x, float* out, i64 index) {
    if (threadIdx.x == 5) *out = x[index];
}

extern "C" __global__ void write_at(float* x, i64 index) {
    if (threadIdx.x == 5) x[index] = 1.0f;
}

extern "C" __global__ void load_vector_at(const u16* x, uint4* out, int index) { *out = load_weight(x + index); }

extern "C" __global__ void write_shared_at(int index) { dynamic_shared<float>()[index] = 1.0f; }

extern "C" __global__ void load_shared_at(int address, uint4* out) {
    *out = load_shared(shared_address(dynamic_shared()) + address);
}

// What shared memory holds before anything is written: of the kernel, of a template, dynamic.
template <int N> __device__ float element_of_template() {
    __shared__ float values[N];
    if (threadIdx.x == 99) values[threadIdx.y] = 0.0f;
    return values[N - 1];
}
extern "C" __global__ void read_uninitialised(float* out) {
    __shared__ float values[8];
    if (threadIdx.x == 99) values[threadIdx.y] = 0.0f;
    out[0] = values[7];
    out[1] = element_of_template<3>();
    out[2] = element_of_template<5>();
    out[3] = dynamic_shared<float>()[1];
    values[7] = out[0] + 1.0f;  // must not be seen by the next block
}

extern "C" __global__ void leave_before_barrier() {
    if (threadIdx.x == 40) return;
    __syncthreads();
}

extern "C" __global__ void leave_before_shuffle(u32* out) {
    if (threadIdx.x == 40) return;
    out[threadIdx.x] = shuffle_xor(threadIdx.x, 1u);
}

extern "C" __global__ void half_a_warp_shuffles(u32* out) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = shuffle_xor(threadIdx.x, 1u);
    __syncthreads();
}

extern "C" __global__ void different_collectives(u32* out) {
    out[threadIdx.x] = threadIdx.x < 7 ? ballot(true) : shuffle_xor(threadIdx.x, 1u);
}

// The neighbour's value, without the barrier that would make sure it is there.
extern "C" __global__ void no_barrier(float* out) {
    __shared__ float values[64];
    values[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

// The first read is protected, but the second round overwrites what slower threads still read.
extern "C" __global__ void no_second_barrier(float* out) {
    __shared__ float values[64];
    for (int round = 0; round < 2; round++) {
        values[threadIdx.x] = threadIdx.x + 1000.0f * round;
        __syncthreads();
        out[64 * round + threadIdx.x] = values[(threadIdx.x + 1) % 64];
    }
}

extern "C" __global__ void read_before_wait(const float* x, float* out) {
    __shared__ float __align__(16) values[4];
    cp_async_16(shared_address(values), x);
    cp_async_commit();
    out[0] = values[0];
    cp_async_wait<0>();
    out[1] = values[0];
}

extern "C" __global__ void wait_for_too_little(const float* x, float* out) {
    __shared__ float __align__(16) values[4];
    cp_async_16(shared_address(values), x);
    cp_async_commit();
    cp_async_wait<1>();
    out[0] = values[0];
}

extern "C" __global__ void loop_forever(volatile u32* flag) {
    while (*flag == 0) {}
}

extern "C" __global__ void wait_for_neighbour(u32* flag, int set_it) {
    if (threadIdx.x == 31 && set_it) atomicExch(flag, 1u);
    while (load_activation_element(flag) == 0) __nanosleep(100);
}

extern "C" __global__ void divide(int* x, int by) { *x /= by; }

extern "C" __global__ void use_much_stack(volatile int* x) {
    volatile char big[200000];
    for (int i = 199999; i >= 0; i--) big[i] = static_cast<char>(i + *x);
    *x = big[*x];
}

extern "C" __global__ void trap_at(u32 thread) {
    if (threadIdx.x == thread) __trap();
}

extern "C" __global__ void activation_before_wait(const uint4* x, uint4* out) {
    const uint4 v = load_activation(x);
    pdl_wait();
    store_vector(out, v);
}

extern "C" __global__ void never_waits(const uint4* x, uint4* out) { *out = load_weight(x); }

struct Three {
    float values[3];
    int index;
};
extern "C" __global__ void by_value(Three three, float scale, i64 offset, const float* maybe, float* out) {
    *out = three.values[three.index] * scale + offset + (maybe ? *maybe : 0.0f);
}

// Where a block came in the order of blocks.
extern "C" __global__ void order(u32* counter, u32* block_order, u32* thread_order) {
    __shared__ u32 arrivals;
    if (threadIdx.x == 0) arrivals = 0, block_order[blockIdx.x] = atomicAdd(counter, 1u);
    __syncthreads();
    thread_order[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(&arrivals, 1u);
}

extern "C" __global__ void __launch_bounds__(64, (1 + 1)) at_most_64_threads() {}
