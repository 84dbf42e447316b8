// What Hopper adds to the machine of runtime.h: barriers in shared memory, the tensor copy engine, wgmma, register
// budgets, named barriers.
//
// All that the hardware does on its own it does here as late as it may, and says so by NaNs until then: a box arrives
// when a thread waits for it and no other can run (with random orders half of them arrive at once instead); products of
// matrices are computed, from what shared memory holds then, when a warpgroup waits for them.
#pragma once

#include "runtime.h"

namespace emulation {

// What a TensorMap of emulated kernels holds; emulator.py repeats the layout. The innermost axis comes first.
struct TensorMapRecord {
    uint64_t magic;
    const char* data;
    int64_t strides[5];  // bytes
    uint32_t sizes[5];
    uint16_t box[5];
    uint8_t rank, weight;
};
static_assert(sizeof(TensorMapRecord) <= 128);

void barrier_init(uint32_t address, uint32_t arrivals);
void barrier_init_fence();
void barrier_arrive(uint32_t address, const char* what, uint32_t bytes);
void barrier_wait(uint32_t address, uint32_t parity);

void tensor_copy(uint32_t address, const void* map, uint32_t barrier, const int* coordinates, uint32_t rank);
void tensor_map_prefetch(const void* map);
void async_shared_fence();
void async_global_fence();

struct Product {
    uint32_t n;
    bool is_bf16, transposed_b, accumulate, a_is_shared;
    uint64_t a, b;  // descriptors
    uint32_t a_registers[4];
};
uint64_t matrix_descriptor(uint32_t address, uint32_t panel_distance, uint32_t group_distance);
void keep_registers(void* registers, uint32_t count);
void wgmma_fence();
void wgmma_start(void* accumulators, const Product& product);
void wgmma_commit();
void wgmma_wait(uint32_t groups_left);

void registers_change(const char* what, uint32_t registers);
void named_barrier(const char* what, uint32_t id, uint32_t threads, bool waits);

}  // namespace emulation
