// The second implementation of the first part of device.cuh: each function by the same name, on the CPU.
// Included by device.cuh under -DCUTP_EMULATION, inside the unnamed namespace that wraps a kernel file.
#pragma once
#include "runtime.h"

// ---- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // one copy serves all blocks: they run one after the other, each after poisoning it

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

struct uint2 { u32 x, y; };
struct float2 { float x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

template <class To, class From> To bits_as(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To r;
    memcpy(&r, &v, sizeof r);
    return r;
}
inline float __uint_as_float(u32 v) { return bits_as<float>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline u32 __float_as_uint(float v) { return bits_as<u32>(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<u32>(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline u32 __umulhi(u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(a) * b) >> 32); }
inline u64 __umul64hi(u64 a, u64 b) { return static_cast<u64>((static_cast<unsigned __int128>(a) * b) >> 64); }
// Never fused with another operation; the emulation is compiled without contraction anyway.
inline float __fmul_rn(float a, float b) { return a * b; }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; i++) r |= static_cast<u32>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return r;
}

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::gather("__syncwarp", nullptr, 0); }
inline void __threadfence() {}
inline void __nanosleep(u32) { emulation::yield(); }
[[noreturn]] inline void __trap() { emulation::fail("__trap"); }

template <class T> T atomic_update(T* p, T (*update)(T old, T operand), T operand) {
    emulation::check_aligned(p, sizeof(T), "atomic operation");
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, update(old, operand), false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
    return old;
}
#define EMULATED_ATOMIC(name, type, result) \
    inline type name(type* p, type v) {                                                    \
        return atomic_update<type>(p, [](type a, type b) -> type { return result; }, v);   \
    }
#define EMULATED_ATOMICS(type)                                                                   \
    EMULATED_ATOMIC(atomicAdd, type, a + b)                                                      \
    EMULATED_ATOMIC(atomicMax, type, max(a, b))                                                  \
    EMULATED_ATOMIC(atomicMin, type, min(a, b))                                                  \
    EMULATED_ATOMIC(atomicAnd, type, a & b)                                                      \
    EMULATED_ATOMIC(atomicOr, type, a | b)                                                       \
    EMULATED_ATOMIC(atomicExch, type, (void(a), b))                                              \
    inline type atomicCAS(type* p, type expected, type v) {                                      \
        emulation::check_aligned(p, sizeof(type), "atomic operation");                           \
        __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); \
        return expected;                                                                         \
    }
EMULATED_ATOMICS(int)
EMULATED_ATOMICS(u32)
EMULATED_ATOMICS(u64)

// ---- global memory

template <class T> T load_as(const void* p, const char* what) {
    emulation::check_aligned(p, sizeof(T), what);
    T v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline uint4 load_weight(const void* p) { return load_as<uint4>(p, "load_weight"); }
inline uint4 load_activation(const void* p) {
    emulation::touch_activation("load_activation");
    return load_as<uint4>(p, "load_activation");
}
inline uint4 load_activation_streamed(const void* p) {
    emulation::touch_activation("load_activation_streamed");
    return load_as<uint4>(p, "load_activation_streamed");
}
inline uint4 load_weight_if(bool valid, const void* p) { return valid ? load_weight(p) : uint4{}; }
inline uint4 load_activation_if(bool valid, const void* p) { return valid ? load_activation(p) : uint4{}; }
template <class T> T load_activation_element(const T* p) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "2, 4 or 8 bytes");
    emulation::touch_activation("load_activation_element");
    return load_as<T>(p, "load_activation_element");
}
inline void store_vector(void* p, uint4 v) {
    emulation::touch_activation("store_vector");
    emulation::check_aligned(p, sizeof v, "store_vector");
    memcpy(p, &v, sizeof v);
}
inline u32 atomic_add_acq_rel(u32* p, u32 v) { return atomicAdd(p, v); }

// ---- shared memory

template <class T = unsigned char> T* dynamic_shared() { return static_cast<T*>(emulation::dynamic_shared()); }
inline u32 shared_address(const void* p) { return emulation::shared_address(p); }
inline uint4 load_shared(u32 address) {
    return load_as<uint4>(emulation::shared_pointer(address, 16, "load_shared"), "load_shared");
}
inline void store_shared(u32 address, uint4 v) {
    memcpy(emulation::shared_pointer(address, 16, "store_shared"), &v, sizeof v);
}
inline void cp_async_16(u32 address, const void* global, bool valid = true) {
    emulation::copy_start(address, global, valid);
}
inline void cp_async_commit() { emulation::copy_commit(); }
template <int N> void cp_async_wait() { emulation::copy_wait(N); }

inline void load_four(u32 (&r)[4], const char* name, u32 address, void (*combine)(emulation::Slot*)) {
    const emulation::Slot* lanes = emulation::gather(name, &address, sizeof address, combine);
    memcpy(r, lanes[emulation::lane()].bytes, sizeof r);
}
inline void ldmatrix_x4(u32 (&r)[4], u32 address) {
    load_four(r, "ldmatrix_x4", address, emulation::load_matrices);
}
inline void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
    load_four(r, "ldmatrix_x4_trans", address, emulation::load_matrices_transposed);
}

// ---- tensor cores

template <class T> void mma_m16n8k16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    static_assert(same_type<T, bf16> || same_type<T, f16>, "bf16 or f16");
    const emulation::MmaOperands mine{{c[0], c[1], c[2], c[3]}, {a0, a1, a2, a3}, {b0, b1}};
    const emulation::Slot* lanes = emulation::gather(
        "mma_m16n8k16", &mine, sizeof mine, same_type<T, bf16> ? emulation::mma_bf16 : emulation::mma_f16);
    memcpy(c, lanes[emulation::lane()].bytes, sizeof c);
}

// ---- warp

template <class T> T lane_value(const char* name, T v, u32 source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    const emulation::Slot* lanes = emulation::gather(name, &v, sizeof v);
    T r;
    memcpy(&r, lanes[source % 32].bytes, sizeof r);
    return r;
}
template <class T> T shuffle_xor(T v, u32 mask) { return lane_value("shuffle_xor", v, emulation::lane() ^ mask); }
template <class T> T shuffle_down(T v, u32 delta) {
    const u32 source = emulation::lane() + delta;
    return lane_value("shuffle_down", v, source < 32 ? source : emulation::lane());
}
template <class T> T shuffle(T v, u32 source) { return lane_value("shuffle", v, source); }
inline u32 ballot(bool condition) {
    const emulation::Slot* lanes = emulation::gather("ballot", &condition, 1);
    u32 r = 0;
    for (int i = 0; i < 32; i++) r |= static_cast<u32>(lanes[i].bytes[0]) << i;
    return r;
}

inline u32 transpose_8x8(u32 v) {
    const emulation::Slot* lanes = emulation::gather("transpose_8x8", &v, sizeof v);
    const u32 row = emulation::lane() % 4 * 2, column = emulation::lane() / 4;
    u16 r[2];
    for (u32 i = 0; i < 2; i++) memcpy(&r[i], lanes[(row + i) * 4 + column / 2].bytes + column % 2 * 2, 2);
    return r[0] | static_cast<u32>(r[1]) << 16;
}

// ---- conversions and approximations

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return emulation::float_of_bf16(v.bits); }
inline float to_float(f16 v) { return emulation::float_of_f16(v.bits); }
template <class T> T from_float(float v) {
    if constexpr (same_type<T, float>) {
        return v;
    } else {
        static_assert(same_type<T, bf16> || same_type<T, f16>, "float, bf16 or f16");
        return T{same_type<T, bf16> ? emulation::bf16_of_float(v) : emulation::f16_of_float(v)};
    }
}
template <class T> u32 pack2(float low, float high) {
    static_assert(same_type<T, bf16> || same_type<T, f16>, "bf16 or f16");
    return from_float<T>(low).bits | static_cast<u32>(from_float<T>(high).bits) << 16;
}
inline float exp2_approx(float v) { return exp2f(v); }
inline float rsqrt_approx(float v) { return 1.0f / sqrtf(v); }
inline float tanh_approx(float v) { return tanhf(v); }
inline float reciprocal_approx(float v) { return 1.0f / v; }

// ---- programmatic dependent launch, time

inline void pdl_wait() { emulation::grid_wait(); }
inline void pdl_launch_dependents() {}
template <int n> struct SpareRegisters {
    void begin() {}
    void end(bool never, void*) const {
        if (never) emulation::fail("SpareRegisters: the condition that is never true is true");
    }
};

inline u64 global_timer() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<u64>(t.tv_sec) * 1000000000u + static_cast<u64>(t.tv_nsec);
}

// ---- more of the language: operations that are never fused with others, and the bits of doubles

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline i64 __double_as_longlong(double v) { return bits_as<i64>(v); }
inline double __longlong_as_double(i64 v) { return bits_as<double>(v); }
