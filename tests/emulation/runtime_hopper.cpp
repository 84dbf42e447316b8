// Barriers in shared memory, the copy engine, register budgets and named barriers of runtime_hopper.h.
#include <algorithm>
#include <memory>

#include "hopper_block.h"

namespace emulation {

static thread_local std::unique_ptr<Block> this_block;  // lives as long as its OS thread

Block& block() {
    if (!this_block) this_block = std::make_unique<Block>();
    if (!this_block->used) this_block->begin();
    return *this_block;
}

Thread& current() { return block().threads[thread_number()]; }

std::string byte_name(uint32_t address) {
    if (address >= static_base) return "byte " + std::to_string(address - static_base) + " of static shared memory";
    return "byte " + std::to_string(static_cast<int64_t>(address) - dynamic_base) + " of dynamic shared memory";
}

uint32_t dynamic_offset(uint32_t address, uint32_t bytes, const char* what) {
    if (address < dynamic_base || address - dynamic_base + static_cast<uint64_t>(bytes) > dynamic_bytes())
        fail("%s of %u bytes at %s, which has %llu bytes", what, bytes, byte_name(address).c_str(),
             static_cast<unsigned long long>(dynamic_bytes()));
    return address - dynamic_base;
}

uint32_t this_warpgroup(const char* what) {
    const uint32_t group = thread_number() / warpgroup;
    if ((group + 1) * warpgroup > thread_count())
        fail("%s by a warpgroup of %u threads", what, thread_count() - group * warpgroup);
    return group;
}

bool meet_warpgroup(const char* what, uint32_t value) {
    Meeting& m = block().warpgroups[this_warpgroup(what)];
    if (!m.waiting.empty() && (strcmp(m.what, what) || m.value != value))
        fail("reached %s (%u) while %s of the same warpgroup waits at %s (%u)", what, value,
             thread_name(m.waiting[0]).c_str(), m.what, m.value);
    m.what = what, m.value = value;
    if (m.waiting.size() + 1 < warpgroup) {
        m.waiting.push_back(thread_number());
        sleep_at(what);
        return false;
    }
    return true;
}

void release_warpgroup() {
    Meeting& m = block().warpgroups[thread_number() / warpgroup];
    for (uint32_t t : m.waiting) wake(t);
    m.waiting.clear();
}

namespace {

constexpr uint64_t map_magic = 0x70616d726f736e74;
constexpr unsigned char barrier_mark = 0xb5;  // what the memory of a barrier holds

// ---- barriers

std::string barrier_name(const Barrier& b) { return "the barrier at " + byte_name(b.address); }

std::string lacks(const Barrier& b) {
    return "phase " + std::to_string(b.phase) + " lacks " + std::to_string(b.pending) + " of " +
           std::to_string(b.expected) + " arrivals and " + std::to_string(b.bytes) + " bytes";
}

Barrier& find_barrier(uint32_t address, const char* what) {
    void* memory = shared_pointer(address, 8, what);
    const auto found = block().barriers.find(address);
    if (found == block().barriers.end()) fail("%s at %s, where there is no barrier", what, byte_name(address).c_str());
    Barrier& b = found->second;
    if (!b.fenced) fail("%s: %s has not seen barrier_init_fence", what, barrier_name(b).c_str());
    if (b.meetings == block().meetings && thread_number() / 32 != b.made_by / 32)
        fail("%s: %s was made by %s, with no __syncthreads since", what, barrier_name(b).c_str(),
             thread_name(b.made_by).c_str());
    const unsigned char* bytes = static_cast<const unsigned char*>(memory);
    if (!std::all_of(bytes, bytes + 8, [](unsigned char c) { return c == barrier_mark; }))
        fail("%s: %s has been overwritten", what, barrier_name(b).c_str());
    return b;
}

// Ends the phase if nothing is missing. `place` is where a mistake has been made.
void settle(Barrier& b, const std::string& place) {
    if (b.pending) return;
    if (b.bytes < 0)
        end_launch(place + barrier_name(b) + " received " + std::to_string(-b.bytes) + " bytes more than it expects");
    if (b.bytes) return;
    uint64_t under_way = 0;
    for (const BoxCopy& c : block().copies) under_way += c.barrier == b.address ? c.bytes : 0;
    if (under_way)
        end_launch(place + "the phase of " + barrier_name(b) + " ends while " + std::to_string(under_way) +
                   " bytes are under way that it does not expect");
    b.phase++;
    b.pending = b.expected;
    for (const Waiter& w : b.waiters) wake(w.thread);
    b.waiters.clear();
}

// ---- copies

void deliver(const BoxCopy& c) {
    const TensorMapRecord& map = c.map;
    const uint32_t begin = c.address - dynamic_base;
    char* memory = dynamic_begin() + begin;
    if (!std::all_of(memory, memory + c.bytes, [](char v) { return v == static_cast<char>(poison_byte()); }))
        end_launch(place_of(c.thread) + "the box that tensor_copy brings to " + byte_name(c.address) +
                   " was written to meanwhile");
    int64_t place[5] = {0, 0, 0, 0, 0};
    for (uint32_t row = 0; row < c.bytes / 128; row++) {
        const char* from = map.data;
        bool inside = true;
        for (int axis = 1; axis < map.rank; axis++) {
            const int64_t i = c.coordinates[axis] + place[axis];
            inside = inside && i >= 0 && i < map.sizes[axis];
            from += i * map.strides[axis];
        }
        uint16_t values[64] = {};
        for (int i = 0; inside && i < 64; i++) {
            const int64_t x = static_cast<int64_t>(c.coordinates[0]) + i;
            if (x >= 0 && x < map.sizes[0]) memcpy(&values[i], from + 2 * x, 2);
        }
        for (uint32_t piece = 0; piece < 8; piece++) {
            const uint32_t offset = swizzled(c.address + 128 * row + 16 * piece) - dynamic_base;
            memcpy(dynamic_begin() + offset, values + 8 * piece, 16);
            memcpy(&block().seen[offset], values + 8 * piece, 16);
        }
        for (int axis = 1; axis < map.rank && ++place[axis] == map.box[axis]; axis++) place[axis] = 0;
    }
}

// Delivers copies for this barrier until its phase ends; whether it did.
bool deliver_for(Barrier& b) {
    std::vector<BoxCopy>& copies = block().copies;
    const uint32_t phase = b.phase;
    for (size_t i = 0; i < copies.size() && b.phase == phase;) {
        if (copies[i].barrier != b.address) {
            i++;
            continue;
        }
        const BoxCopy copy = copies[i];
        copies.erase(copies.begin() + i);
        deliver(copy);
        b.bytes -= copy.bytes;
        settle(b, place_of(copy.thread));
    }
    return b.phase != phase;
}

const TensorMapRecord& record_of(const char* what, const void* map) {
    const TensorMapRecord& r = *static_cast<const TensorMapRecord*>(map);
    if (r.magic != map_magic) fail("%s: not a TensorMap that was passed as an argument", what);
    return r;
}
const TensorMapRecord& record_of(const char* what, const void* map, const int* coordinates, uint32_t rank) {
    const TensorMapRecord& r = record_of(what, map);
    if (r.rank != rank) fail("%s with %u coordinates, but the array of the map has %u axes", what, rank, r.rank);
    if (coordinates[0] % 8) fail("%s from element %d of a row, no multiple of 8", what, coordinates[0]);
    return r;
}

}  // namespace

// ---- what kernels call

void barrier_init(uint32_t address, uint32_t arrivals) {
    void* memory = shared_pointer(address, 8, "barrier_init");
    if (arrivals == 0 || arrivals >= 1 << 20) fail("barrier_init for %u arrivals", arrivals);
    if (block().barriers.count(address))
        fail("barrier_init at %s, where there is a barrier already", byte_name(address).c_str());
    block().barriers[address] = {address, arrivals, arrivals, 0, thread_number(), block().meetings, 0, false, {}};
    memset(memory, barrier_mark, 8);
}

void barrier_init_fence() {
    for (auto& [address, b] : block().barriers) b.fenced = b.fenced || b.made_by == thread_number();
}

void barrier_arrive(uint32_t address, const char* what, uint32_t bytes) {
    Barrier& b = find_barrier(address, what);
    if (!b.pending)
        fail("%s: %s has had all of its %u arrivals in this phase", what, barrier_name(b).c_str(), b.expected);
    b.pending--;
    b.bytes += bytes;
    settle(b, place_of(thread_number()));
}

void barrier_wait(uint32_t address, uint32_t parity) {
    Barrier& b = find_barrier(address, "barrier_wait");
    if (parity > 1) fail("barrier_wait for parity %u", parity);
    while (b.phase % 2 == parity) {
        const uint32_t phase = b.phase;
        b.waiters.push_back({thread_number(), phase});
        sleep_at("barrier_wait");
        if (b.phase > phase + 1)
            fail("barrier_wait: phase %u of %s ended before a thread that waited for phase %u could go on", phase + 1,
                 barrier_name(b).c_str(), phase);
    }
}

void tensor_map_prefetch(const void* map) { record_of("tensor_map_prefetch", map); }

void tensor_copy(uint32_t address, const void* map, uint32_t barrier, const int* coordinates, uint32_t rank) {
    BoxCopy copy = {record_of("tensor_copy", map, coordinates, rank), {}, address, 2, barrier, thread_number()};
    for (uint32_t i = 0; i < rank; i++) copy.coordinates[i] = coordinates[i], copy.bytes *= copy.map.box[i];
    if (pdl() && !copy.map.weight) {
        if (!has_waited_for_grid()) fail("tensor_copy of a TensorMap that is no weight before pdl_wait");
        if (!current().global_fence) fail("tensor_copy after pdl_wait without async_global_fence between them");
    }
    if (address % 128) fail("tensor_copy to shared address %u, which is not 128-byte aligned", address);
    const uint32_t begin = dynamic_offset(address, copy.bytes, "tensor_copy");
    find_barrier(barrier, "tensor_copy");
    for (const BoxCopy& other : block().copies)
        if (address < other.address + other.bytes && other.address < address + copy.bytes)
            fail("tensor_copy to %s, where one from %s is still under way", byte_name(address).c_str(),
                 thread_name(other.thread).c_str());
    if (memcmp(dynamic_begin() + begin, &block().seen[begin], copy.bytes))
        fail("tensor_copy to %s, which was stored to without async_shared_fence", byte_name(address).c_str());
    memset(dynamic_begin() + begin, poison_byte(), copy.bytes);
    memset(&block().seen[begin], poison_byte(), copy.bytes);
    block().copies.push_back(copy);
    if (toss()) deliver_for(block().barriers[barrier]);
}

void async_shared_fence() { memcpy(block().seen.data(), dynamic_begin(), dynamic_bytes()); }
void async_global_fence() { current().global_fence = has_waited_for_grid(); }

void registers_change(const char* what, uint32_t registers) {
    if (!meet_warpgroup(what, registers)) return;
    block().registers[thread_number() / warpgroup] = registers;
    release_warpgroup();
}

void named_barrier(const char* what, uint32_t id, uint32_t threads, bool waits) {
    if (id < 1 || id > 15) fail("%s: there is no barrier %u, only 1 to 15", what, id);
    if (threads % 32 || !threads || threads > thread_count())
        fail("%s: barrier %u for %u threads, in a block of %u", what, id, threads, thread_count());
    NamedBarrier& b = block().named[id];
    if (b.arrived.empty()) b.threads = threads;
    if (b.threads != threads)
        fail("%s: barrier %u for %u threads, but %s came for %u", what, id, threads, thread_name(b.arrived[0]).c_str(),
             b.threads);
    if (std::find(b.arrived.begin(), b.arrived.end(), thread_number()) != b.arrived.end())
        fail("%s: the thread comes to barrier %u a second time before the others have come", what, id);
    b.arrived.push_back(thread_number());
    if (b.arrived.size() == threads) {
        for (uint32_t t : b.waiting) wake(t);
        block().meetings++;
        b.arrived.clear();
        b.waiting.clear();
    } else if (waits) {
        b.waiting.push_back(thread_number());
        sleep_at(what);
    }
}

// ---- what the scheduler calls

void hopper_block_begins() {
    if (this_block) this_block->used = false;
}

void hopper_block_meets() {
    if (this_block && this_block->used) this_block->meetings++;
}

void hopper_thread_ends() {
    if (!this_block || !this_block->used) return;
    wgmma_end_thread();
}

void hopper_block_ends() {
    if (!this_block || !this_block->used) return;
    if (!block().copies.empty())
        end_launch(place_of(block().copies[0].thread) + "the kernel ends while a box is on its way to " +
                   byte_name(block().copies[0].address));
    const uint32_t each = 65536 / thread_count() / 8 * 8;
    uint32_t sum = 0;
    for (uint32_t r : block().registers) sum += r ? r : each;
    if (sum > each * block().registers.size())
        end_launch(place_of(0) + "the register budgets of its warpgroups are " + std::to_string(sum) +
                   " in all, but the kernel begins with " + std::to_string(each) + " for each of " +
                   std::to_string(block().registers.size()));
}

bool hopper_progress() {
    if (!this_block || !this_block->used) return false;
    std::vector<Barrier*> waited_for;
    for (auto& [address, b] : block().barriers)
        if (!b.waiters.empty()) waited_for.push_back(&b);
    while (!waited_for.empty()) {
        const auto next = waited_for.begin() + one_of(static_cast<uint32_t>(waited_for.size()));
        if (deliver_for(**next)) return true;
        waited_for.erase(next);
    }
    return false;
}

std::string hopper_deadlock() {
    if (!this_block || !this_block->used) return "";
    for (const auto& [address, b] : block().barriers)
        if (!b.waiters.empty())
            return place_of(b.waiters[0].thread) + "waits for " + barrier_name(b) + ", whose " + lacks(b);
    for (uint32_t id = 1; id < 16; id++) {
        const NamedBarrier& b = block().named[id];
        if (!b.waiting.empty())
            return place_of(b.waiting[0]) + "waits at named_barrier_sync for barrier " + std::to_string(id) +
                   ", to which " + std::to_string(b.arrived.size()) + " of " + std::to_string(b.threads) +
                   " threads have come";
    }
    for (const Meeting& m : block().warpgroups)
        if (!m.waiting.empty())
            return place_of(m.waiting[0]) + "waits at " + m.what + " for " +
                   std::to_string(warpgroup - m.waiting.size()) + " other threads of its warpgroup";
    return "";
}

}  // namespace emulation
