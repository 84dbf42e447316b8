// What every kernel here is written with: vectors, memory access, conversions, warp and block reductions,
// asynchronous copies, tensor cores, programmatic dependent launch. All PTX of the project is in this file and, for
// what only Hopper has, in hopper.cuh.
//
// A kernel file starts with #include "device.cuh", may include headers of this folder behind it, contains no inline
// assembly, and defines `extern "C" __global__` functions; variants are selected by macros given on the compiler's
// command line (-DDTYPE=BF16, F16 or F32 selects `scalar_t`). The same text then compiles under NVRTC for sm_80 and
// later, and, with -DCUTP_EMULATION, under g++: emulation.h gives every function of the first part below a second
// implementation that runs on the CPU.
//
// Conventions: blockDim.x is a multiple of 32; warp functions are called by all 32 lanes, block functions by all
// threads of the block; "shared address" means the 32-bit address of `shared_address`.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

template <class A, class B> constexpr bool same_type = false;
template <class A> constexpr bool same_type<A, A> = true;

#ifdef CUTP_EMULATION
#include "emulation.h"
#else

// ---------------------------------------------------------------------------------------------------------------
// First part: what the machine does in one or a few instructions. emulation.h has the twin of each function.
// ---------------------------------------------------------------------------------------------------------------

// ---- global memory

// 16 bytes of a weight: streamed past L1. Only for memory that nobody else writes while the kernel runs, nor a kernel
// that may still be at work when it starts (decode_plan.cu, for one, lets none start before).
// Not an .nc load: those the assembler moves behind a `pdl_wait` that follows them, this one stays before it.
__device__ __forceinline__ uint4 load_weight(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// 16 bytes of an activation. Never the read-only path: under programmatic dependent launch the kernel before may
// still be writing when this kernel starts, and the compiler must not move the load above `pdl_wait`.
__device__ __forceinline__ uint4 load_activation(const void* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// The same for what this kernel reads once, as keys and values of a long context: past L1, in large pieces from DRAM.
__device__ __forceinline__ uint4 load_activation_streamed(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// The same two where `valid`; zeros otherwise, and then `p` is not read. Written without a branch, into which the
// compiler would move the computation of the address.
__device__ __forceinline__ uint4 load_weight_if(bool valid, const void* p) {
    uint4 v;
    asm volatile("{\n.reg .pred valid;\nsetp.ne.u32 valid, %5, 0;\n"
                 "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
                 "@valid ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "r"(static_cast<u32>(valid)));
    return v;
}
__device__ __forceinline__ uint4 load_activation_if(bool valid, const void* p) {
    uint4 v;
    asm volatile("{\n.reg .pred valid;\nsetp.ne.u32 valid, %5, 0;\n"
                 "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
                 "@valid ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "r"(static_cast<u32>(valid)) : "memory");
    return v;
}

// One element (2, 4 or 8 bytes) that an earlier kernel may have written: lengths, positions, page numbers, scalars.
template <class T> __device__ __forceinline__ T load_activation_element(const T* p) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "2, 4 or 8 bytes");
    union { T value; u16 b2; u32 b4; u64 b8; } r;
    if constexpr (sizeof(T) == 2) asm volatile("ld.global.u16 %0, [%1];" : "=h"(r.b2) : "l"(p) : "memory");
    if constexpr (sizeof(T) == 4) asm volatile("ld.global.u32 %0, [%1];" : "=r"(r.b4) : "l"(p) : "memory");
    if constexpr (sizeof(T) == 8) asm volatile("ld.global.u64 %0, [%1];" : "=l"(r.b8) : "l"(p) : "memory");
    return r.value;
}

// 16 bytes to global memory. Single elements are stored by plain assignment.
__device__ __forceinline__ void store_vector(void* p, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// *p += v, returning the old value; releases what this thread wrote before and acquires what earlier adders
// released. For tickets: `if (atomic_add_acq_rel(counter, 1) == total - 1)` is the last to arrive.
__device__ __forceinline__ u32 atomic_add_acq_rel(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}

// Integer atomics without ordering, on global and shared memory, u32 and u64: the language's own atomicAdd, atomicMax,
// atomicMin, atomicAnd, atomicOr, atomicExch, atomicCAS. Floats have none here: their sum would depend on timing.

// ---- shared memory

// The dynamic shared memory of the block (the `shared_bytes` of the launch), 16-byte aligned or better.
template <class T = unsigned char> __device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char cutp_dynamic_shared[];
    return reinterpret_cast<T*>(cutp_dynamic_shared);
}

// The shared address of a pointer into shared memory, for the functions below that take one.
__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes from and to a shared address.
__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ void store_shared(u32 address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Starts copying 16 bytes from global to shared memory; zeros arrive where !valid, and then `global` is not read.
__device__ __forceinline__ void cp_async_16(u32 address, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(address), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// Closes the group of copies that this thread started since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are unfinished. Other threads see the data after __syncthreads().
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the shared address of row i%8 of matrix i/8. Lane l receives from
// matrix m, in r[m], the elements (l/4, 2(l%4)) and (l/4, 2(l%4)+1); transposed: (2(l%4), l/4) and (2(l%4)+1, l/4).
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// ---- tensor cores

// C[16x8] += A[16x16] B[16x8], T = bf16 or f16, C in float. With g = lane/4 and t = lane%4, register pairs hold
// a0: A[g][2t..], a1: A[g+8][2t..], a2: A[g][2t+8..], a3: A[g+8][2t+8..]; b0: B[2t..][g], b1: B[2t+8..][g];
// c[0], c[1]: C[g][2t], C[g][2t+1]; c[2], c[3]: C[g+8][2t], C[g+8][2t+1].
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    static_assert(same_type<T, bf16> || same_type<T, f16>, "bf16 or f16");
    if constexpr (same_type<T, bf16>) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// ---- warp: every lane of the warp takes part

// The value of lane (own ^ mask), (own + delta; its own beyond lane 31), `source`. 4- and 8-byte types.
template <class T> __device__ __forceinline__ T shuffle_xor(T v, u32 mask) { return __shfl_xor_sync(~0u, v, mask); }
template <class T> __device__ __forceinline__ T shuffle_down(T v, u32 delta) { return __shfl_down_sync(~0u, v, delta); }
template <class T> __device__ __forceinline__ T shuffle(T v, u32 source) { return __shfl_sync(~0u, v, source); }
// Bit i is set where lane i's condition holds.
__device__ __forceinline__ u32 ballot(bool condition) { return __ballot_sync(~0u, condition); }

// An 8x8 matrix of 16-bit elements, transposed: lane l gives the elements (l/4, 2(l%4)) and (l/4, 2(l%4)+1), and
// receives (2(l%4), l/4) and (2(l%4)+1, l/4). Turns a packed result of an mma into an operand of the next.
__device__ __forceinline__ u32 transpose_8x8(u32 v) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// The language's own __syncthreads() and __syncwarp() are the barriers.

// ---- conversions (round to nearest, ties to even) and approximations

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float(static_cast<u32>(v.bits) << 16); }
__device__ __forceinline__ float to_float(f16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
    return r;
}

// v rounded to T = float (unchanged), bf16 or f16.
template <class T> __device__ __forceinline__ T from_float(float v) {
    if constexpr (same_type<T, float>) {
        return v;
    } else {
        static_assert(same_type<T, bf16> || same_type<T, f16>, "float, bf16 or f16");
        T r;
        if constexpr (same_type<T, bf16>) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
        else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
        return r;
    }
}

// Two values rounded to T = bf16 or f16 in one register, `low` in the low half.
template <class T> __device__ __forceinline__ u32 pack2(float low, float high) {
    static_assert(same_type<T, bf16> || same_type<T, f16>, "bf16 or f16");
    u32 r;
    if constexpr (same_type<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// 2^v, 1/sqrt(v) and tanh(v) by the special function unit: relative errors about 2^-22, 2^-22 and 2^-11.
__device__ __forceinline__ float exp2_approx(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ float rsqrt_approx(float v) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ float tanh_approx(float v) {
    float r;
    asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// 1/v by the same unit: relative error about 2^-23.
__device__ __forceinline__ float reciprocal_approx(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// ---- programmatic dependent launch (nothing below sm_90, where kernels never overlap)

// Returns when the kernel before has finished and its writes are visible. Every thread of every kernel calls it once,
// after loading weights and before touching activations: a kernel that skipped it would let the next one start
// while the one before is still running.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start its prologue. Orders nothing: the next kernel's `pdl_wait` does.
__device__ __forceinline__ void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- registers

// n registers that a kernel holds from `begin` to `end` and does not need: how many blocks a multiprocessor has room for
// depends on how many registers they take. They begin as what no compiler can compute again, and end in a store that is
// not made: `never` is false, which the compiler must not know.
template <int n> struct SpareRegisters {
    u32 of[n > 0 ? n : 1];

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < n; i++) asm volatile("mov.u32 %0, %%clock;" : "=r"(of[i]));
    }
    __device__ __forceinline__ void end(bool never, void* p) const {
        if (!never) return;
#pragma unroll
        for (int i = 0; i < n; i++) static_cast<volatile u32*>(p)[i] = of[i];
    }
};

// ---- time

// Nanoseconds of a clock that all blocks share, for bounds on waiting (its resolution may be 1 us).
__device__ __forceinline__ u64 global_timer() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
    return t;
}

#endif  // CUTP_EMULATION

// ---------------------------------------------------------------------------------------------------------------
// Second part: built from the first, the same text on both.
// ---------------------------------------------------------------------------------------------------------------

#ifdef DTYPE
typedef bf16 dtype_BF16;
typedef f16 dtype_F16;
typedef float dtype_F32;
#define CUTP_DTYPE_OF(name) dtype_##name
#define CUTP_DTYPE(name) CUTP_DTYPE_OF(name)
// The element type of this compilation.
typedef CUTP_DTYPE(DTYPE) scalar_t;
#endif

constexpr int warp_size = 32;

// Place of this thread in its warp, and of its warp in the row of threads along x.
__device__ __forceinline__ int lane_id() { return threadIdx.x % warp_size; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / warp_size; }

__device__ __forceinline__ float positive_infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// How many T fill 16 bytes.
template <class T> constexpr int vector_size = 16 / sizeof(T);

// 16 bytes as floats, and back with one rounding each.
template <class T> __device__ __forceinline__ void unpack(uint4 v, float (&f)[vector_size<T>]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (same_type<T, float>) {
            f[i] = __uint_as_float(words[i]);
        } else {
            f[2 * i] = to_float(T{static_cast<u16>(words[i])});
            f[2 * i + 1] = to_float(T{static_cast<u16>(words[i] >> 16)});
        }
    }
}
template <class T> __device__ __forceinline__ uint4 pack(const float (&f)[vector_size<T>]) {
    if constexpr (same_type<T, float>)
        return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
    else
        return make_uint4(pack2<T>(f[0], f[1]), pack2<T>(f[2], f[3]), pack2<T>(f[4], f[5]), pack2<T>(f[6], f[7]));
}

// v rounded to T and back: a rounding point inside a computation.
template <class T> __device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

// Sum and maximum over the warp, the same bits in every lane: partners 16, 8, 4, 2, 1 lanes away are combined, and
// both of a pair compute the same commutative operation.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) v += shuffle_xor(v, distance);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) v = fmaxf(v, shuffle_xor(v, distance));
    return v;
}

// Sum and maximum over the threads with the same threadIdx.y and .z, in an order that depends on blockDim.x alone;
// every thread receives the result. `scratch` is 32 floats of shared memory, free for other use when the function
// returns; where blockDim.x is 32 it is not used and there is no barrier, otherwise the block must be 1-dimensional.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    const int warps = blockDim.x / warp_size;
    if (warps == 1) return v;
    if (lane_id() == 0) scratch[warp_id()] = v;
    __syncthreads();
    v = warp_sum(lane_id() < warps ? scratch[lane_id()] : 0.0f);
    __syncthreads();
    return v;
}
__device__ __forceinline__ float block_max(float v, float* scratch) {
    v = warp_max(v);
    const int warps = blockDim.x / warp_size;
    if (warps == 1) return v;
    if (lane_id() == 0) scratch[warp_id()] = v;
    __syncthreads();
    v = warp_max(lane_id() < warps ? scratch[lane_id()] : negative_infinity());
    __syncthreads();
    return v;
}

// `count` elements as floats, zeros behind them, and back with one rounding each. A whole vector (a count of at least
// vector_size<T>) is one 16-byte access; fewer elements, as at the end of an array of any length, are one access each.
template <class T>
__device__ __forceinline__ void load_activations(const T* p, int count, float (&f)[vector_size<T>]) {
    if (count >= vector_size<T>) {
        unpack<T>(load_activation(p), f);
    } else {
#pragma unroll
        for (int i = 0; i < vector_size<T>; i++) f[i] = i < count ? to_float(load_activation_element(p + i)) : 0.0f;
    }
}
template <class T>
__device__ __forceinline__ void store_activations(T* p, int count, const float (&f)[vector_size<T>]) {
    if (count >= vector_size<T>) {
        store_vector(p, pack<T>(f));
    } else {
#pragma unroll
        for (int i = 0; i < vector_size<T>; i++)
            if (i < count) p[i] = from_float<T>(f[i]);
    }
}
