// Kernels that misuse hopper.cuh, each in one way. They are for the emulation only.
#include "../../cutp/ops/device.cuh"
#include "../../cutp/ops/hopper.cuh"

// Shared memory of all of these: barriers, then operands.
__device__ u32 barrier_at(int i) { return shared_address(dynamic_shared()) + 8 * i; }
__device__ u32 data() { return shared_address(dynamic_shared()) + 1024; }
__device__ bool first() { return threadIdx.x == 0; }

__device__ void make_barrier(int i, u32 arrivals) {
    if (first()) {
        barrier_init(barrier_at(i), arrivals);
        barrier_init_fence();
    }
    __syncthreads();
}

// ---- barriers

extern "C" __global__ void no_barrier_there() {
    make_barrier(0, 1);
    barrier_wait(barrier_at(1), 1);
}
extern "C" __global__ void barrier_without_fence() {
    if (first()) barrier_init(barrier_at(0), 1);
    __syncthreads();
    barrier_wait(barrier_at(0), 1);
}
extern "C" __global__ void barrier_with_fence_of_another() {
    if (first()) barrier_init(barrier_at(0), 1);
    __syncthreads();
    if (threadIdx.x == 1) barrier_init_fence();
    __syncthreads();
    barrier_wait(barrier_at(0), 1);
}
extern "C" __global__ void barrier_without_meeting() {
    if (first()) {
        barrier_init(barrier_at(0), 1);
        barrier_init_fence();
    }
    __syncwarp();
    barrier_wait(barrier_at(0), 1);
}
extern "C" __global__ void overwritten_barrier() {
    make_barrier(0, 1);
    dynamic_shared<u32>()[1] = threadIdx.x;
    barrier_wait(barrier_at(0), 1);
}
extern "C" __global__ void barrier_made_twice() {
    make_barrier(0, 1);
    make_barrier(0, 1);
}
extern "C" __global__ void barrier_for_nobody() { make_barrier(0, 0); }
extern "C" __global__ void barrier_between_words() {
    if (first()) barrier_init(barrier_at(0) + 4, 1);
}
extern "C" __global__ void arrival_too_many() {
    make_barrier(0, 2);
    if (first()) barrier_arrive_expect(barrier_at(0), 128);
    if (threadIdx.x < 2) barrier_arrive(barrier_at(0));
}
extern "C" __global__ void barrier_that_lacks(int arrivals, int bytes) {
    make_barrier(0, 3);
    if (static_cast<int>(threadIdx.x) < arrivals) barrier_arrive_expect(barrier_at(0), bytes);
    if (threadIdx.x == 32) barrier_wait(barrier_at(0), 0);
    __syncthreads();
}
extern "C" __global__ void odd_parity() {
    make_barrier(0, 1);
    barrier_wait(barrier_at(0), 2);
}
extern "C" __global__ void missed_phase() {
    make_barrier(0, 1);
    if (threadIdx.x == 32) barrier_wait(barrier_at(0), 0);
    __syncwarp();
    if (first()) {
        barrier_arrive(barrier_at(0));
        barrier_arrive(barrier_at(0));
    }
}

// ---- the copy engine: boxes of 8 rows

constexpr u32 box_bytes = 8 * 128;

extern "C" __global__ void copy_to(const __grid_constant__ TensorMap map, int byte) {
    make_barrier(0, 1);
    if (first()) {
        barrier_arrive_expect(barrier_at(0), box_bytes);
        tensor_copy(data() + byte, map, barrier_at(0), 0, 0);
    }
    barrier_wait(barrier_at(0), 0);
}
// The element of the first row that a thread sees before and after its wait.
extern "C" __global__ void look_before_arrival(const __grid_constant__ TensorMap map, float* before, float* after) {
    const bf16* row = reinterpret_cast<bf16*>(dynamic_shared() + 1024);
    make_barrier(0, 1);
    if (first()) {
        barrier_arrive_expect(barrier_at(0), box_bytes);
        tensor_copy(data(), map, barrier_at(0), 0, 0);
    }
    __syncthreads();
    before[threadIdx.x] = to_float(row[threadIdx.x]);
    barrier_wait(barrier_at(0), 0);
    after[threadIdx.x] = to_float(row[threadIdx.x]);
}
extern "C" __global__ void expects(const __grid_constant__ TensorMap map, int bytes) {
    make_barrier(0, 2);
    if (first()) {
        tensor_copy(data(), map, barrier_at(0), 0, 0);
        barrier_arrive(barrier_at(0));
        barrier_arrive_expect(barrier_at(0), bytes);
    }
    barrier_wait(barrier_at(0), 0);
}
extern "C" __global__ void copies_by_a_warp(const __grid_constant__ TensorMap map) {
    make_barrier(0, 1);
    if (first()) barrier_arrive_expect(barrier_at(0), box_bytes);
    __syncwarp();
    tensor_copy(data(), map, barrier_at(0), 0, 0);
}
extern "C" __global__ void store_under_way(const __grid_constant__ TensorMap map) {
    make_barrier(0, 1);
    if (first()) {
        barrier_arrive_expect(barrier_at(0), box_bytes);
        tensor_copy(data(), map, barrier_at(0), 0, 0);
        store_shared(data() + 512, make_uint4(1, 2, 3, 4));
    }
    barrier_wait(barrier_at(0), 0);
}
extern "C" __global__ void copy_over_stores(const __grid_constant__ TensorMap map, int fence) {
    make_barrier(0, 1);
    store_shared(data() + 16 * threadIdx.x, make_uint4(1, 2, 3, 4));
    if (fence) async_shared_fence();
    __syncthreads();
    if (first()) {
        barrier_arrive_expect(barrier_at(0), box_bytes);
        tensor_copy(data(), map, barrier_at(0), 0, 0);
    }
    barrier_wait(barrier_at(0), 0);
}
extern "C" __global__ void three_coordinates(const __grid_constant__ TensorMap map) {
    make_barrier(0, 1);
    if (first()) tensor_copy(data(), map, barrier_at(0), 0, 0, 0);
}
extern "C" __global__ void from_element(const __grid_constant__ TensorMap map, int element) {
    make_barrier(0, 1);
    if (first()) tensor_copy(data(), map, barrier_at(0), element, 0);
}
extern "C" __global__ void not_a_parameter(const __grid_constant__ TensorMap map) {
    TensorMap other = map;
    other.bytes[0]++;
    tensor_map_prefetch(other);
}
extern "C" __global__ void copy_before_wait(const __grid_constant__ TensorMap map, int wait, int fence) {
    make_barrier(0, 1);
    if (wait) pdl_wait();
    if (fence) async_global_fence();
    if (first()) {
        barrier_arrive_expect(barrier_at(0), box_bytes);
        tensor_copy(data(), map, barrier_at(0), 0, 0);
    }
    barrier_wait(barrier_at(0), 0);
    pdl_wait();
}
extern "C" __global__ void nobody_waits(const __grid_constant__ TensorMap map) {
    make_barrier(0, 1);
    if (first()) {
        barrier_arrive_expect(barrier_at(0), box_bytes);
        tensor_copy(data(), map, barrier_at(0), 0, 0);
    }
}

// ---- wgmma: ones[64][16] times twos[8][16]^T, whose sums are 32

__device__ u32 ones() { return data(); }
__device__ u32 twos() { return data() + 64 * 128; }
__device__ u64 a_operand() { return matrix_descriptor(ones(), 16, 1024); }
__device__ u64 b_operand() { return matrix_descriptor(twos(), 16, 1024); }

__device__ void fill(u32 begin, int rows, float value) {
    const u32 pair = pack2<bf16>(value, value);
    for (int i = threadIdx.x; i < 8 * rows; i += blockDim.x)
        store_shared(begin + 16 * i, make_uint4(pair, pair, pair, pair));
}
__device__ void make_operands() {
    fill(ones(), 64, 1.0f);
    fill(twos(), 8, 2.0f);
    async_shared_fence();
    __syncthreads();
}
__device__ void begin(float (&d)[4]) {
    for (int i = 0; i < 4; i++) d[i] = 0.0f;
    keep_registers(d);
    wgmma_fence();
}
__device__ void start(float (&d)[4]) { wgmma_shared<bf16, 8, false>(d, a_operand(), b_operand(), true); }
template <int left = 0> __device__ void finish(float (&d)[4]) {
    wgmma_commit();
    wgmma_wait<left>();
    keep_registers(d);
}
__device__ void write(float* out, float (&d)[4]) {
    for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = d[i];
}

extern "C" __global__ void right_product(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    finish(d);
    write(out, d);
}
extern "C" __global__ void product_without_fence(float* out) {
    float d[4] = {};
    make_operands();
    keep_registers(d);
    start(d);
    finish(d);
    write(out, d);
}
extern "C" __global__ void product_without_second_fence(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    finish(d);
    for (int i = 0; i < 4; i++) d[i] *= 0.5f;
    keep_registers(d);
    start(d);
    finish(d);
    write(out, d);
}
extern "C" __global__ void product_on_other_registers(float* out) {
    float d[4], e[4];
    make_operands();
    begin(d);
    start(e);
    finish(e);
    write(out, e);
}
extern "C" __global__ void product_on_changed_registers(float* out) {
    float d[4];
    make_operands();
    begin(d);
    d[1] = 5.0f;
    start(d);
    finish(d);
    write(out, d);
}
extern "C" __global__ void result_before_wait(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    wgmma_commit();
    write(out, d);
    wgmma_wait<0>();
    keep_registers(d);
}
extern "C" __global__ void result_of_an_unfinished_group(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    finish<1>(d);
    write(out, d);
    wgmma_wait<0>();
    keep_registers(d);
}
extern "C" __global__ void result_without_commit(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    wgmma_wait<0>();
    keep_registers(d);
    write(out, d);
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(d);
}
extern "C" __global__ void scaled_before_wait(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    for (int i = 0; i < 4; i++) d[i] *= 0.5f;
    finish(d);
    write(out, d);
}
extern "C" __global__ void leaves_before_wait() {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    wgmma_commit();
}
extern "C" __global__ void leaves_results() {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    wgmma_commit();
    wgmma_wait<0>();
}
extern "C" __global__ void different_products(float* out) {
    float d[4];
    make_operands();
    begin(d);
    wgmma_shared<bf16, 8, false>(d, a_operand(), b_operand(), threadIdx.x < 64);
    finish(d);
    write(out, d);
}
extern "C" __global__ void fewer_products(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    if (threadIdx.x < 96) start(d);
    finish(d);
    write(out, d);
}
extern "C" __global__ void different_waits(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    if (threadIdx.x < 64) finish<0>(d);
    else finish<1>(d);
    write(out, d);
}
extern "C" __global__ void some_do_not_wait(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    if (threadIdx.x >= 32) finish(d);
    __syncthreads();
    write(out, d);
}
extern "C" __global__ void other_shape(float* out) {
    float d[8] = {};
    make_operands();
    keep_registers(d);
    wgmma_fence();
    float(&half)[4] = reinterpret_cast<float(&)[4]>(d);
    start(half);
    wgmma_shared<bf16, 16, false>(d, a_operand(), b_operand(), true);
    finish(half);
    write(out, half);
}
extern "C" __global__ void operand_at(int byte, int panel_distance, int group_distance, int transposed, u64 bits) {
    float d[64] = {};
    make_operands();
    keep_registers(d);
    wgmma_fence();
    const u64 b = matrix_descriptor(ones() + byte, panel_distance, group_distance) ^ bits;
    if (transposed) wgmma_shared<bf16, 128, true>(d, a_operand(), b, true);
    else wgmma_shared<bf16, 128, false>(d, a_operand(), b, true);
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(d);
}
extern "C" __global__ void static_operand() {
    __shared__ float rows[32];
    matrix_descriptor(shared_address(rows), 16, 1024);
}
extern "C" __global__ void operand_without_fence(float* out) {
    float d[4];
    make_operands();
    fill(twos(), 8, 4.0f);
    __syncthreads();
    begin(d);
    start(d);
    finish(d);
    write(out, d);
}
extern "C" __global__ void operand_changed_too_early(float* out) {
    float d[4];
    make_operands();
    begin(d);
    start(d);
    fill(twos(), 8, 4.0f);
    async_shared_fence();
    finish(d);
    write(out, d);
}

extern "C" __global__ void operand_under_way(const __grid_constant__ TensorMap map, float* out) {
    float d[4];
    make_barrier(0, 1);
    make_operands();
    if (first()) {
        barrier_arrive_expect(barrier_at(0), box_bytes);
        tensor_copy(twos(), map, barrier_at(0), 0, 0);
    }
    __syncthreads();
    begin(d);
    start(d);
    finish(d);
    write(out, d);
    barrier_wait(barrier_at(0), 0);
}

// ---- budgets and named barriers

extern "C" __global__ void budgets(int large) {
    if (threadIdx.x < 128) registers_decrease<40>();
    else if (large) registers_increase<240>();
    else registers_increase<232>();
}
extern "C" __global__ void budget_of_three_warps() {
    if (threadIdx.x < 96) registers_decrease<40>();
    __syncthreads();
}
extern "C" __global__ void budgets_of_one_warpgroup() {
    if (threadIdx.x < 64) registers_decrease<40>();
    else registers_increase<40>();
}
extern "C" __global__ void named_barriers(u32 id, u32 threads, u32 others_threads, int rounds) {
    if (threadIdx.x < 32) {
        named_barrier_sync(id, threads);
    } else {
        for (int i = 0; i < rounds; i++) named_barrier_arrive(id, others_threads);
    }
}
