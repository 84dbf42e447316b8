// Hopper's own machinery, for kernels that exist for sm_90a only: barriers in shared memory, the tensor copy engine
// (TMA), matrix products of whole warpgroups (wgmma), register budgets. Included after device.cuh; together the two
// hold all PTX of the project, and emulation_hopper.h has the second implementation of this file.
//
// A warpgroup is four warps whose first is a multiple of four. Operands of wgmma and boxes of the copy engine lie in
// shared memory in rows of 128 bytes (64 elements of 16 bits), of which the 16-byte pieces are permuted by the row's
// place in its group of 8 ("128-byte swizzle"); every such panel begins at a multiple of 1024 bytes.
#pragma once

// What the copy engine knows of an array in global memory: made on the host by cutp.array.tensor_map, passed by value
// as `const __grid_constant__ TensorMap`. Coordinates and boxes count elements, the innermost axis first.
struct alignas(64) TensorMap {
    u8 bytes[128];
};

template <class T, int N>
constexpr bool wgmma_exists = (same_type<T, bf16> || same_type<T, f16>) &&
                              (N == 8 || N == 16 || N == 32 || N == 64 || N == 80 || N == 96 || N == 128 ||
                               N == 176 || N == 256);

#ifdef CUTP_EMULATION
#include "emulation_hopper.h"
#else

// ---- barriers in shared memory: 8 bytes each, by shared address
//
// A barrier counts arrivals and bytes that copies have still to deliver; when both reach zero its phase ends and it
// counts from the start again. Waiting for parity p returns once the phase of that parity has ended: a new barrier is
// in the phase of parity 0, and waiting for parity 1 on it returns at once.

// By one thread, before any other use; then `barrier_init_fence` by the same thread and __syncthreads by all.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// The same, and the phase also waits for `bytes` more.
__device__ __forceinline__ void barrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}"
                 :: "r"(barrier), "r"(parity) : "memory");
}

// ---- the copy engine: by one thread; the box that begins at the coordinates (which may lie outside, there zeros
// arrive) goes to shared memory at `address`, a multiple of 128, and its bytes, all of them, are counted by `barrier`.
// c0 is a multiple of 8: another is an illegal instruction.
// Where ordinary stores wrote to that memory before, an `async_shared_fence` must be between.

__device__ __forceinline__ void tensor_copy(u32 address, const TensorMap& map, u32 barrier, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];"
                 :: "r"(address), "l"(&map), "r"(barrier), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tensor_copy(u32 address, const TensorMap& map, u32 barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(address), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tensor_copy(u32 address, const TensorMap& map, u32 barrier, int c0, int c1, int c2,
                                            int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                 :: "r"(address), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
__device__ __forceinline__ void tensor_copy(u32 address, const TensorMap& map, u32 barrier, int c0, int c1, int c2,
                                            int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                 :: "r"(address), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// As tensor_copy for what is read once, as weights: L2 gives it up first.
__device__ __forceinline__ void tensor_copy_streamed(u32 address, const TensorMap& map, u32 barrier, int c0, int c1) {
    asm volatile("{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%3, %4}], [%2], policy;\n}"
                 :: "r"(address), "l"(&map), "r"(barrier), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tensor_copy_streamed(u32 address, const TensorMap& map, u32 barrier, int c0, int c1,
                                                     int c2) {
    asm volatile("{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%3, %4, %5}], [%2], policy;\n}"
                 :: "r"(address), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

// Brings the map itself near, before its first use.
__device__ __forceinline__ void tensor_map_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}

// ---- order between ordinary accesses and those of the copy engine and of wgmma (the "async proxy")

// Own ordinary writes to shared memory before this are seen by such accesses after it (and after a barrier).
__device__ __forceinline__ void async_shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory: after `pdl_wait`, before copying what the kernel before wrote.
__device__ __forceinline__ void async_global_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- wgmma: D[64 x N] (+)= A[64 x 16] B[16 x N], T = bf16 or f16, D in float, by all threads of a warpgroup
//
// Thread t of the warpgroup, with warp w = t / 32, g = t % 32 / 4, q = t % 4, holds of D, for j < N / 8:
// d[4j], d[4j+1]: D[16w+g][8j+2q], D[16w+g][8j+2q+1]; d[4j+2], d[4j+3]: the same of row 16w+g+8.
// A from registers: a[0]: A[16w+g][2q..], a[1]: A[16w+g+8][2q..], a[2]: A[16w+g][2q+8..], a[3]: A[16w+g+8][2q+8..].
//
// Products are started between `wgmma_fence` (own registers are as they should be) and `wgmma_commit` (closes a
// group); their registers must not be touched until `wgmma_wait<n>` (at most n groups are unfinished). The compiler
// must see that: pass what the products use through `keep_registers` before the fence and after the wait. Products that
// go on summing in registers of unfinished ones need neither. Where a product starts must be the same for all threads
// of the warpgroup, and the memory of its operands must not change before it is finished.

// Where an operand lies: 16-byte units of its address (bits 0-13), of the distance between its panels of 64 columns
// where rows of shared memory run along M or N (bits 16-29), and of the distance between groups of 8 rows (32-45).
// Rows along K ("K-major": K contiguous): the distance between groups is 1024, the next 16 of K are 32 bytes further
// within a panel; the panel distance is not used. Rows along N ("transposed": N contiguous, as values in attention):
// groups are 1024 apart, the next 16 of K are 2048 bytes further.
__device__ __forceinline__ u64 matrix_descriptor(u32 address, u32 panel_distance, u32 group_distance) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | static_cast<u64>((panel_distance & 0x3ffff) >> 4) << 16 |
           static_cast<u64>((group_distance & 0x3ffff) >> 4) << 32 | 1ull << 62;
}
// The descriptor of the operand `bytes` further.
__device__ __forceinline__ u64 descriptor_at(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int groups_left> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(groups_left) : "memory");
}
template <int n> __device__ __forceinline__ void keep_registers(float (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}
template <int n> __device__ __forceinline__ void keep_registers(u32 (&a)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+r"(a[i]) :: "memory");
}

// The accumulators of a product as text, and as operands of the assembler: CUTP_D8(16) is d[16] to d[23].
#define CUTP_R4 "%0, %1, %2, %3"
#define CUTP_R8 CUTP_R4 ", %4, %5, %6, %7"
#define CUTP_R16 CUTP_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CUTP_R32 CUTP_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CUTP_R40 CUTP_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define CUTP_R48 CUTP_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define CUTP_R64 CUTP_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CUTP_R88 CUTP_R64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
    "%85, %86, %87"
#define CUTP_R128 CUTP_R88 \
    ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
    "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
    "%125, %126, %127"
#define CUTP_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CUTP_D8(i) CUTP_D4(i), CUTP_D4(i + 4)
#define CUTP_D16(i) CUTP_D8(i), CUTP_D8(i + 8)
#define CUTP_D32(i) CUTP_D16(i), CUTP_D16(i + 16)
#define CUTP_D64(i) CUTP_D32(i), CUTP_D32(i + 32)
#define CUTP_D88(i) CUTP_D64(i), CUTP_D16(i + 64), CUTP_D8(i + 80)
#define CUTP_D40(i) CUTP_D32(i), CUTP_D8(i + 32)
#define CUTP_D48(i) CUTP_D32(i), CUTP_D16(i + 32)
#define CUTP_D128(i) CUTP_D64(i), CUTP_D64(i + 64)

// For each N: how many accumulators a thread has, and the numbers of the operands that follow them: the descriptor of
// B, whether to accumulate, whether B is transposed (an immediate), and A.
#define CUTP_EACH_N(PRODUCT)                                             \
    PRODUCT(8, 4, "%4", "%5", "%6", "%7", "{%7, %8, %9, %10}")           \
    PRODUCT(16, 8, "%8", "%9", "%10", "%11", "{%11, %12, %13, %14}")     \
    PRODUCT(32, 16, "%16", "%17", "%18", "%19", "{%19, %20, %21, %22}")  \
    PRODUCT(64, 32, "%32", "%33", "%34", "%35", "{%35, %36, %37, %38}")  \
    PRODUCT(80, 40, "%40", "%41", "%42", "%43", "{%43, %44, %45, %46}")  \
    PRODUCT(96, 48, "%48", "%49", "%50", "%51", "{%51, %52, %53, %54}")  \
    PRODUCT(128, 64, "%64", "%65", "%66", "%67", "{%67, %68, %69, %70}") \
    PRODUCT(176, 88, "%88", "%89", "%90", "%91", "{%91, %92, %93, %94}") \
    PRODUCT(256, 128, "%128", "%129", "%130", "%131", "{%131, %132, %133, %134}")

// The instruction, as the functions below use it: `b`, `accumulate`, `transposed_b` and `a` are theirs.
#define CUTP_WGMMA_OF(type, n, count, b_text, use_text, flags, a_text, ...)                                       \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, " use_text ", 0;\n"                          \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" CUTP_R##count "}, " a_text  \
                 ", " b_text ", accumulate, 1, 1, " flags ";\n}"                                                  \
                 : CUTP_D##count(0)                                                                               \
                 : "l"(b), "r"(static_cast<u32>(accumulate)), "n"(static_cast<int>(transposed_b)), __VA_ARGS__)
#define CUTP_WGMMA(n, count, b_text, use_text, flags, a_text, ...)                                       \
    if constexpr (N == n && same_type<T, bf16>)                                                          \
        CUTP_WGMMA_OF("bf16", n, count, b_text, use_text, flags, a_text, __VA_ARGS__);                   \
    if constexpr (N == n && same_type<T, f16>)                                                           \
        CUTP_WGMMA_OF("f16", n, count, b_text, use_text, flags, a_text, __VA_ARGS__);
// The flag "transposed" of A exists where A is in shared memory only.
#define CUTP_WGMMA_SHARED(n, count, b_text, use_text, flag, a_text, unused) \
    CUTP_WGMMA(n, count, b_text, use_text, "0, " flag, a_text, "l"(a))
#define CUTP_WGMMA_REGISTERS(n, count, b_text, use_text, flag, unused, a_text) \
    CUTP_WGMMA(n, count, b_text, use_text, flag, a_text, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))

// N = 8, 16, 32, 64, 80, 96, 128, 176 or 256. Without `accumulate` D begins at zero.
template <class T, int N, bool transposed_b>
__device__ __forceinline__ void wgmma_shared(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    static_assert(wgmma_exists<T, N>, "bf16 or f16, and N of the list");
    CUTP_EACH_N(CUTP_WGMMA_SHARED)
}
template <class T, int N, bool transposed_b>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
    static_assert(wgmma_exists<T, N>, "bf16 or f16, and N of the list");
    CUTP_EACH_N(CUTP_WGMMA_REGISTERS)
}

// ---- register budgets: all warps of a warpgroup call one of these; a multiple of 8 from 24 to 240. The kernel must be
// declared with __launch_bounds__(threads, 1), and the budgets of all its threads must fit into what it began with:
// 65536 / threads each, rounded down to a multiple of 8.

template <int registers> __device__ __forceinline__ void registers_decrease() {
    static_assert(registers % 8 == 0 && 24 <= registers && registers <= 240, "a multiple of 8 from 24 to 240");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(registers));
}
template <int registers> __device__ __forceinline__ void registers_increase() {
    static_assert(registers % 8 == 0 && 24 <= registers && registers <= 240, "a multiple of 8 from 24 to 240");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(registers));
}

// ---- barriers of some warps: id 1 to 15 (0 is __syncthreads). `threads` is how many come in all, those that only
// arrive and do not wait among them; whole warps come.

__device__ __forceinline__ void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

#endif  // CUTP_EMULATION
