// The second implementation of hopper.cuh: each function by the same name, on the CPU.
// Included by hopper.cuh under -DCUTP_EMULATION, inside the unnamed namespace that wraps a kernel file.
#pragma once
#include "runtime_hopper.h"

inline void barrier_init(u32 barrier, u32 arrivals) { emulation::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() { emulation::barrier_init_fence(); }
inline void barrier_arrive(u32 barrier) { emulation::barrier_arrive(barrier, "barrier_arrive", 0); }
inline void barrier_arrive_expect(u32 barrier, u32 bytes) {
    emulation::barrier_arrive(barrier, "barrier_arrive_expect", bytes);
}
inline void barrier_wait(u32 barrier, u32 parity) { emulation::barrier_wait(barrier, parity); }

template <class... C> void tensor_copy(u32 address, const TensorMap& map, u32 barrier, int c0, int c1, C... others) {
    static_assert(sizeof...(C) <= 3, "2 to 5 coordinates");
    const int coordinates[] = {c0, c1, others...};
    emulation::tensor_copy(address, &map, barrier, coordinates, 2 + sizeof...(C));
}
template <class... C>
void tensor_copy_streamed(u32 address, const TensorMap& map, u32 barrier, int c0, int c1, C... others) {
    static_assert(sizeof...(C) <= 1, "2 or 3 coordinates");
    tensor_copy(address, map, barrier, c0, c1, others...);
}
inline void tensor_map_prefetch(const TensorMap& map) { emulation::tensor_map_prefetch(&map); }

inline void async_shared_fence() { emulation::async_shared_fence(); }
inline void async_global_fence() { emulation::async_global_fence(); }

inline u64 matrix_descriptor(u32 address, u32 panel_distance, u32 group_distance) {
    return emulation::matrix_descriptor(address, panel_distance, group_distance);
}
inline u64 descriptor_at(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

inline void wgmma_fence() { emulation::wgmma_fence(); }
inline void wgmma_commit() { emulation::wgmma_commit(); }
template <int groups_left> void wgmma_wait() { emulation::wgmma_wait(groups_left); }
template <int n> void keep_registers(float (&d)[n]) { emulation::keep_registers(d, n); }
template <int n> void keep_registers(u32 (&a)[n]) { emulation::keep_registers(a, n); }

template <class T, int N, bool transposed_b>
void wgmma_shared(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    static_assert(wgmma_exists<T, N>, "bf16 or f16, and N of the list");
    emulation::wgmma_start(d, {N, same_type<T, bf16>, transposed_b, accumulate, true, a, b, {}});
}
template <class T, int N, bool transposed_b>
void wgmma_registers(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
    static_assert(wgmma_exists<T, N>, "bf16 or f16, and N of the list");
    emulation::wgmma_start(d, {N, same_type<T, bf16>, transposed_b, accumulate, false, 0, b, {a[0], a[1], a[2], a[3]}});
}

template <int registers> void registers_decrease() {
    static_assert(registers % 8 == 0 && 24 <= registers && registers <= 240, "a multiple of 8 from 24 to 240");
    emulation::registers_change("registers_decrease", registers);
}
template <int registers> void registers_increase() {
    static_assert(registers % 8 == 0 && 24 <= registers && registers <= 240, "a multiple of 8 from 24 to 240");
    emulation::registers_change("registers_increase", registers);
}

inline void named_barrier_sync(u32 id, u32 threads) {
    emulation::named_barrier("named_barrier_sync", id, threads, true);
}
inline void named_barrier_arrive(u32 id, u32 threads) {
    emulation::named_barrier("named_barrier_arrive", id, threads, false);
}
