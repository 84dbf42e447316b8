// What Hopper adds to the state of a block, for the files that share it: runtime_hopper.cpp and runtime_wgmma.cpp.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "machine.h"
#include "runtime_hopper.h"

namespace emulation {

constexpr uint32_t warpgroup = 128;  // threads

struct Waiter {
    uint32_t thread, phase;
};
struct Barrier {
    uint32_t address, expected, pending, phase, made_by, meetings;  // meetings: of the block, before it was made
    int64_t bytes;  // still to come in this phase
    bool fenced;
    std::vector<Waiter> waiters;
};
struct BoxCopy {
    TensorMapRecord map;
    int coordinates[5];
    uint32_t address, bytes, barrier, thread;
};
struct NamedBarrier {
    uint32_t threads;
    std::vector<uint32_t> arrived, waiting;
};
// Where the threads of a warpgroup wait for each other.
struct Meeting {
    const char* what;
    uint32_t value;
    std::vector<uint32_t> waiting;
};
// Registers as `keep_registers` saw them last.
struct Kept {
    uint32_t* registers;
    std::vector<uint32_t> values;
    uint64_t time;
};
// Registers that products write: `values` is what they will hold, the registers themselves hold no value meanwhile.
struct Accumulators {
    uint32_t* registers;
    std::vector<float> values;
    uint32_t unfinished;
};
struct StartedProduct : Product {
    uint32_t* accumulators;
    uint32_t group;
};
struct Thread {
    std::vector<Kept> kept;
    std::vector<Accumulators> accumulators;
    std::vector<StartedProduct> products;
    uint32_t groups = 0;
    uint64_t fence_time = 0;
    bool global_fence = false;
};

struct Block {
    bool used = false;
    std::map<uint32_t, Barrier> barriers;
    std::vector<BoxCopy> copies;
    NamedBarrier named[16];
    std::vector<Meeting> warpgroups;
    uint32_t meetings;  // how often the whole block, or the threads of a named barrier, have met
    std::vector<uint32_t> registers;
    std::vector<Thread> threads;
    // Dynamic shared memory as the copy engine and wgmma see it: without ordinary stores since `async_shared_fence`.
    std::vector<char> seen;
    uint64_t time;
    // Of the product that is being computed.
    struct {
        float a[64][16], b[16][256], d[64][256];
    } matrices;

    void begin() {
        used = true;
        barriers.clear();
        copies.clear();
        for (NamedBarrier& n : named) n = {};
        warpgroups.assign(thread_count() / warpgroup, {});
        meetings = 0;
        registers.assign(thread_count() / warpgroup, 0);
        threads.assign(thread_count(), {});
        seen.assign(dynamic_bytes(), static_cast<char>(poison_byte()));
        time = 0;
    }
};

// The state of the block that runs now on this OS thread, and of its current thread.
Block& block();
Thread& current();

// "byte 8 of dynamic shared memory"
std::string byte_name(uint32_t address);

// [address, address + bytes) as an offset into dynamic shared memory; fails if it is not.
uint32_t dynamic_offset(uint32_t address, uint32_t bytes, const char* what);

// Where the 16-byte piece at this address lies: its place in a row of 128 bytes is changed by the row's in a group of
// 8 rows.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The number of the current thread's warpgroup; fails unless there are all of its threads.
uint32_t this_warpgroup(const char* what);

// Waits for the other threads of the warpgroup, all of which must give the same value. True in the one that comes last,
// which must call `release_warpgroup` for the others to go on.
bool meet_warpgroup(const char* what, uint32_t value);
void release_warpgroup();

// runtime_wgmma.cpp: fails if the current thread must not leave the kernel yet.
void wgmma_end_thread();

}  // namespace emulation
