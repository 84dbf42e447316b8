// The machine that emulated kernels run on: one fiber per CUDA thread, one block at a time per OS thread.
//
// Fibers switch only inside the functions below, so between two collectives a CUDA thread runs alone; which one
// runs next depends on the order seed of the launch. Whatever a GPU would leave undefined or answer with a hang ends
// the launch with a message instead.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <type_traits>
#include <utility>

#if !defined(__GNUC__) || !defined(__linux__) || __cplusplus < 201703L
#error "the emulation needs g++ in C++17 mode on Linux"
#endif

struct uint3 { uint32_t x, y, z; };
struct dim3 { uint32_t x, y, z; };

namespace emulation {

// The built-in variables of the CUDA thread that runs now on this OS thread.
extern __thread uint3 thread_index, block_index;
extern __thread dim3 block_size, grid_size;

// What one lane hands to the others in a warp collective.
struct Slot { alignas(16) unsigned char bytes[64]; };

// Ends the launch with this message and the place of the current thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

uint32_t lane();

// A warp collective called `name`: publishes `bytes` bytes and waits for the other lanes. The result is the 32
// published values, valid until this lane's next collective; `combine`, if any, has run over them once.
const Slot* gather(const char* name, const void* value, uint32_t bytes, void (*combine)(Slot*) = nullptr);

// Waits for all threads of the block.
void block_barrier();

// Lets other threads run: for loops that wait for memory to change.
void yield();

// Fails unless `p` is aligned as a `bytes`-wide access needs.
inline void check_aligned(const void* p, uint32_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail("%s at %p, which is not %u-byte aligned", what, p, bytes);
}

// Shared memory. Addresses are 32-bit; `shared_pointer` fails unless [address, address + bytes) is shared memory and
// the address is a multiple of `bytes`.
void* dynamic_shared();
uint32_t shared_address(const void* p);
void* shared_pointer(uint32_t address, uint32_t bytes, const char* what);

// Copies happen as late as they may, in `copy_wait`; until then the destination holds NaNs.
void copy_start(uint32_t shared, const void* global, bool valid);
void copy_commit();
void copy_wait(uint32_t groups_left);

// Programmatic dependent launch: `touch_activation` fails in a launch with pdl=True before `grid_wait`.
void grid_wait();
void touch_activation(const char* what);

// The two kinds of fragment arithmetic of the warp, as `combine` functions and results.
struct MmaOperands { float c[4]; uint32_t a[4], b[2]; };
void mma_bf16(Slot* lanes);
void mma_f16(Slot* lanes);
void load_matrices(Slot* lanes);
void load_matrices_transposed(Slot* lanes);

// Conversions as the GPU makes them: ties to even, every NaN becomes 0x7fff.
inline float float_of_bf16(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float v;
    memcpy(&v, &word, sizeof v);
    return v;
}
inline uint16_t bf16_of_float(float v) {
    if (v != v) return 0x7fff;
    uint32_t word;
    memcpy(&word, &v, sizeof v);
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
float float_of_f16(uint16_t bits);
uint16_t f16_of_float(float v);

// ---- calling a kernel with arguments that arrive as an array of addresses

// kind 'p' (bytes of what it points to; 0: void), 'i', 'f', 't' (a TensorMap), 's' (another struct)
struct Parameter { char kind; uint32_t bytes; };

template <class T> Parameter describe_parameter() {
    if constexpr (std::is_pointer_v<T>) {
        typedef std::remove_pointer_t<T> Target;
        if constexpr (std::is_void_v<Target>) return {'p', 0};
        else return {'p', sizeof(Target)};
    } else {
        const bool is_map = sizeof(T) == 128 && alignof(T) == 64;
        return {std::is_floating_point_v<T> ? 'f' : std::is_integral_v<T> ? 'i' : is_map ? 't' : 's', sizeof(T)};
    }
}

template <class... P, size_t... I>
void call_with(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
}
template <class... P> void call(void (*kernel)(P...), void** arguments) {
    call_with(kernel, arguments, std::index_sequence_for<P...>());
}
template <class... P> int describe(void (*)(P...), Parameter* out) {
    ((*out++ = describe_parameter<P>()), ...);
    return sizeof...(P);
}

}  // namespace emulation

// Makes the kernel `name`, which the file defined in an unnamed namespace, callable from outside.
#define EMULATED_KERNEL(name)                                                                            \
    extern "C" void call_##name(void** arguments) { emulation::call(name, arguments); }                 \
    extern "C" int describe_##name(emulation::Parameter* out) { return emulation::describe(name, out); }
