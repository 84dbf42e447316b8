// What the parts of the runtime know of each other: runtime.cpp, which runs threads, and the files that have what
// Hopper adds to a block.
#pragma once

#include <string>
#include <vector>

#include "runtime.h"

namespace emulation {

constexpr uint32_t static_base = 1 << 20, dynamic_base = 1 << 10;  // shared addresses

// ---- runtime.cpp

// The current thread's number in its block, and how many there are.
uint32_t thread_number();
uint32_t thread_count();

// Stops the current thread until `wake` is called for it. what: where it waits, for messages.
void sleep_at(const char* what);
void wake(uint32_t thread);

// "thread (5, 0, 0)"; "block (0, 0, 0), thread (5, 0, 0): "
std::string thread_name(uint32_t thread);
std::string place_of(uint32_t thread);
// Ends the launch with this message, as it is.
[[noreturn]] void end_launch(const std::string& what);

// Of the launch: whether blocks of it may overlap with the kernel before, and whether the current thread has waited
// for that; true half of the time where the order is random; the first, the last or any of n, as the order is; a byte
// of what unwritten memory holds.
bool pdl();
bool has_waited_for_grid();
bool toss();
uint32_t one_of(uint32_t n);
unsigned char poison_byte();

// Dynamic shared memory.
char* dynamic_begin();
uint64_t dynamic_bytes();

// ---- runtime_hopper.cpp

void hopper_block_begins();
void hopper_block_meets();  // at __syncthreads
void hopper_thread_ends();
void hopper_block_ends();
// Called when no thread can run: whether one can now.
bool hopper_progress();
// Why a thread waits here for ever, if one does.
std::string hopper_deadlock();

}  // namespace emulation
