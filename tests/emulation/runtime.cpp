// The machine of runtime.h: fibers and their scheduler, collectives, guarded memory, and what turns a fault or a hang
// into a message.
#include "machine.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>
#if !defined(__x86_64__) || defined(EMULATION_PORTABLE)
#define EMULATION_UCONTEXT
#endif
#include <ucontext.h>
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace emulation {

__thread uint3 thread_index, block_index;
__thread dim3 block_size, grid_size;

namespace {

const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
constexpr size_t stack_bytes = 128 << 10;
constexpr size_t guard_bytes = 16 << 20;  // an index that is off by a whole row should still land in it
constexpr uint32_t max_threads = 1024;

// ---- contexts: a stack and the registers that a call preserves

#if !defined(EMULATION_UCONTEXT)
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
    .text
    .globl emulation_switch
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch, .-emulation_switch
)");

struct Context {
    void* stack_pointer;

    void prepare(char* stack, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + stack_bytes);
        *--top = nullptr;  // where `entry` would return to; it also aligns the stack as a call does
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; i++) *--top = nullptr;
        stack_pointer = top;
    }
    static void change(Context& from, Context& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
    ucontext_t registers;

    void prepare(char* stack, void (*entry)()) {
        getcontext(&registers);
        registers.uc_stack.ss_sp = stack;
        registers.uc_stack.ss_size = stack_bytes;
        registers.uc_link = nullptr;
        makecontext(&registers, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
};
#endif

// ---- state

struct Copy {
    void* to;
    const void* from;
    bool valid;
    uint32_t group;
};

struct Fiber {
    Context context;
    char* stack = nullptr;
    uint32_t id;
    uint3 index;
    const char* waits_at;  // the collective it waits in
    bool finished, waited_for_grid;
    uint32_t groups_committed;
    std::vector<Copy> copies;
};

struct Rendezvous {
    const char* name;
    uint32_t first_thread, expected, arrived;
    std::vector<Fiber*> waiting;

    void reset(uint32_t first, uint32_t count) {
        first_thread = first, expected = count, arrived = 0;
        waiting.clear();
    }
};

struct Warp {
    Rendezvous rendezvous;
    // Two sets in turn: a lane that is ahead may publish again while others still read the last set.
    Slot slots[2][32];
    uint32_t turn;
};

struct Random {  // splitmix64
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    uint32_t below(uint32_t n) { return static_cast<uint32_t>(next() % n); }
    template <class T> void permute(std::vector<T>& v) {
        for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[below(static_cast<uint32_t>(i))]);
    }
};

}  // namespace

// What Python passes; the layouts are repeated in emulator.py.
struct Region {
    char* begin;
    uint64_t bytes;
    int32_t argument;
};
struct Launch {
    void (*call)(void**);
    void** arguments;
    uint32_t grid[3], block[3];
    uint64_t shared_bytes, order_seed;
    double seconds;
    int32_t pdl;
    int32_t n_buffers, n_statics;
    const Region* buffers;  // the arrays, for messages
    const Region* statics;  // the kernel file's __shared__ variables, by address
    char* message;
    uint64_t message_bytes;
};

namespace {

struct Machine {
    const Launch* launch;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Rendezvous block;
    Fiber* current;
    uint32_t alive, size;
    bool running = false, any_waited_for_grid;
    Context host;
    sigjmp_buf escape;
    // Threads that can run, as a ring; `policy` says which of them runs next.
    Fiber* ready[max_threads];
    uint32_t head, tail;
    uint32_t yields;  // since the last call of hopper_progress
    enum { first_in, last_in, any } policy;
    Random random;
    // What unwritten memory holds: NaN for even seeds, huge numbers for odd ones (a maximum ignores NaN).
    unsigned char poison;
    // Dynamic shared memory, ending at an unmapped page.
    char *shared_pages = nullptr, *shared = nullptr;
    size_t shared_capacity = 0;
    char *static_begin, *static_end;  // from the first to the last of the __shared__ variables
    char* signal_stack = nullptr;
    timer_t watchdog;

    Machine();
    ~Machine();
    Fiber*& slot(uint32_t i) { return ready[i % max_threads]; }
    void push(Fiber* f) { slot(tail++) = f; }
    bool none_ready() const { return head == tail; }
    Fiber* pop();
    void start_block();
    void prepare(const Launch& launch);
    void run_blocks();
};

// Of this OS thread; it goes with the thread, as a process may map only so many ranges and each fiber takes two. Signal
// handlers ask for it too, so it is a plain pointer.
thread_local Machine* machine = nullptr;
thread_local std::unique_ptr<Machine> owned_machine;

std::string text(const uint3& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
std::string name(const Fiber& f) { return "thread " + text(f.index); }
std::string name_of_block() { return "block " + text(block_index); }

}  // namespace

// Abandons all fibers as they are; kernels own nothing that would have to be released.
void end_launch(const std::string& what) {
    Machine& m = *machine;
    snprintf(m.launch->message, m.launch->message_bytes, "%s", what.c_str());
    siglongjmp(m.escape, 1);
}

namespace {

std::string here() { return name_of_block() + ", " + name(*machine->current) + ": "; }

// ---- scheduling

Fiber* Machine::pop() {
    if (policy == last_in) return slot(--tail);
    if (policy == any) std::swap(slot(head), slot(head + random.below(tail - head)));
    return slot(head++);
}

// What the threads of the block do that have not finished, by how many.
std::string activities() {
    std::vector<std::pair<std::string, uint32_t>> counts;
    for (uint32_t id = 0; id < machine->size; id++) {
        const Fiber& f = machine->fibers[id];
        const std::string what = f.finished ? "have left the kernel" : std::string("wait at ") + f.waits_at;
        auto found = std::find_if(counts.begin(), counts.end(), [&](const auto& c) { return c.first == what; });
        if (found == counts.end()) counts.emplace_back(what, 1);
        else found->second++;
    }
    std::string text;
    for (const auto& c : counts) text += (text.empty() ? "" : ", ") + std::to_string(c.second) + " " + c.first;
    return text;
}

// Names a thread that keeps `r` waiting and what it does instead.
std::string missing(const Rendezvous& r) {
    for (uint32_t id = r.first_thread; id < r.first_thread + r.expected; id++) {
        const Fiber& f = machine->fibers[id];
        if (std::find(r.waiting.begin(), r.waiting.end(), &f) != r.waiting.end()) continue;
        if (f.finished) return name(f) + " has left the kernel";
        return name(f) + " waits at " + f.waits_at;
    }
    return "";
}

[[noreturn]] void deadlock() {
    Machine& m = *machine;
    const std::string why = hopper_deadlock();
    if (!why.empty()) end_launch(why + "; of the threads of the block, " + activities());
    const Rendezvous* stuck = &m.block;
    for (const Warp& w : m.warps)
        if (w.rendezvous.arrived) stuck = &w.rendezvous;
    end_launch(name_of_block() + ", " + name(*stuck->waiting[0]) + ": waits at " + stuck->name + " with " +
               std::to_string(stuck->arrived - 1) + " others for " + std::to_string(stuck->expected - stuck->arrived) +
               " threads that never come: " + missing(*stuck));
}

// The thread to run next, once the current one cannot.
Fiber* next_thread() {
    if (machine->none_ready() && !hopper_progress()) deadlock();
    return machine->pop();
}

void resume(Fiber* f) {
    machine->current = f;
    thread_index = f->index;
}

// Runs `next` until another thread runs this one again.
void run_instead(Fiber* next) {
    Fiber* self = machine->current;
    if (next == self) return;
    resume(next);
    Context::change(self->context, next->context);
}

void fiber_main() {
    Machine& m = *machine;
    m.launch->call(m.launch->arguments);
    Fiber* self = m.current;
    hopper_thread_ends();
    self->finished = true;
    Context* next = &m.host;
    if (--m.alive) {
        Fiber* f = next_thread();
        resume(f);
        next = &f->context;
    }
    Context::change(self->context, *next);
    abort();
}

// Waits for the other threads of `r`. `complete` runs in the one that comes last, before the others go on.
template <class Complete> void meet(Rendezvous& r, const char* name, Complete complete) {
    Machine& m = *machine;
    if (r.arrived && strcmp(r.name, name))
        fail("reached %s while %s of the same warp waits at %s", name, emulation::name(*r.waiting[0]).c_str(), r.name);
    r.name = name;
    if (++r.arrived < r.expected) {
        m.current->waits_at = name;
        r.waiting.push_back(m.current);
        return run_instead(next_thread());
    }
    complete();
    r.arrived = 0;
    for (Fiber* f : r.waiting) m.push(f);
    r.waiting.clear();
}

// ---- blocks

char* map_memory(size_t bytes, int protection) {
    void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("emulation: mmap");
        abort();
    }
    return static_cast<char*>(p);
}

size_t whole_pages(size_t bytes) { return (bytes + page - 1) / page * page; }

void Machine::prepare(const Launch& l) {
    launch = &l;
    block_size = {l.block[0], l.block[1], l.block[2]};
    grid_size = {l.grid[0], l.grid[1], l.grid[2]};
    size = block_size.x * block_size.y * block_size.z;
    random.state = l.order_seed;
    policy = l.order_seed % 3 == 0 ? first_in : l.order_seed % 3 == 1 ? last_in : any;
    poison = l.order_seed % 2 ? 0x7e : 0xff;
    if (fibers.size() < size) fibers.resize(size);
    for (uint32_t i = 0; i < size; i++) {
        Fiber& f = fibers[i];
        f.id = i;
        f.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
        if (!f.stack) {
            f.stack = map_memory(page + stack_bytes, PROT_READ | PROT_WRITE) + page;
            mprotect(f.stack - page, page, PROT_NONE);
        }
    }
    warps.resize(size / 32);
    if (!shared_pages || shared_capacity < l.shared_bytes) {
        if (shared_pages) munmap(shared_pages, shared_capacity + page);
        shared_capacity = whole_pages(l.shared_bytes + 1);
        shared_pages = map_memory(shared_capacity + page, PROT_READ | PROT_WRITE);
        mprotect(shared_pages + shared_capacity, page, PROT_NONE);
    }
    shared = shared_pages + shared_capacity - (l.shared_bytes + 15) / 16 * 16;
    static_begin = l.n_statics ? l.statics[0].begin : nullptr;
    static_end = l.n_statics ? l.statics[l.n_statics - 1].begin + l.statics[l.n_statics - 1].bytes : nullptr;
}

void Machine::start_block() {
    memset(shared, poison, launch->shared_bytes);
    for (int i = 0; i < launch->n_statics; i++) memset(launch->statics[i].begin, poison, launch->statics[i].bytes);
    std::vector<uint32_t> order(size);
    for (uint32_t i = 0; i < size; i++) {
        Fiber& f = fibers[i];
        f.context.prepare(f.stack, fiber_main);
        order[i] = i;
        f.finished = f.waited_for_grid = false;
        f.groups_committed = 0;
        f.copies.clear();
    }
    if (launch->order_seed) random.permute(order);
    block.reset(0, size);
    for (uint32_t w = 0; w < warps.size(); w++) warps[w].rendezvous.reset(32 * w, 32), warps[w].turn = 0;
    head = tail = 0;
    for (uint32_t i : order) push(&fibers[i]);
    alive = size;
    any_waited_for_grid = false;
    yields = 0;
    hopper_block_begins();
}

void Machine::run_blocks() {
    std::vector<uint3> blocks;
    for (uint32_t z = 0; z < grid_size.z; z++)
        for (uint32_t y = 0; y < grid_size.y; y++)
            for (uint32_t x = 0; x < grid_size.x; x++) blocks.push_back({x, y, z});
    if (launch->order_seed) random.permute(blocks);
    for (const uint3& b : blocks) {
        block_index = b;
        start_block();
        Fiber* f = pop();
        resume(f);
        Context::change(host, f->context);
        hopper_block_ends();
        if (launch->pdl && !any_waited_for_grid)
            end_launch(name_of_block() + ": no thread called pdl_wait in a launch with pdl=True");
    }
}

// ---- faults

struct sigaction previous[NSIG];

std::string nearest_buffer(const char* address) {
    const Region* best = nullptr;
    uint64_t best_distance = guard_bytes;
    for (int i = 0; i < machine->launch->n_buffers; i++) {
        const Region& b = machine->launch->buffers[i];
        const uint64_t distance = address < b.begin              ? b.begin - address
                                  : address >= b.begin + b.bytes ? address - (b.begin + b.bytes)
                                                                 : 0;
        if (distance < best_distance) best = &b, best_distance = distance;
    }
    if (!best) return "an address near none of the arguments";
    const std::string array = "argument " + std::to_string(best->argument);
    const long long offset = address - best->begin;
    if (offset < 0) return std::to_string(-offset) + " bytes before the start of " + array;
    if (static_cast<uint64_t>(offset) < best->bytes)
        return array + " at byte " + std::to_string(offset) + ", which is read-only";
    return array + " at byte " + std::to_string(offset) + ", but it has " + std::to_string(best->bytes) + " bytes";
}

std::string describe_fault(const siginfo_t* info, bool writes) {
    const char* address = static_cast<const char*>(info->si_addr);
    const Machine& m = *machine;
    const char* stack = m.current->stack;
    if (address >= stack - page && address < stack) return "stack overflow: local arrays of more than 128 KiB";
    const std::string verb = writes ? "writes " : "reads ";
    const char* shared_end = m.shared_pages + m.shared_capacity;
    if (address >= shared_end && address < shared_end + page)
        return verb + "dynamic shared memory at byte " + std::to_string(address - m.shared) + ", but it has " +
               std::to_string(m.launch->shared_bytes) + " bytes";
    return verb + nearest_buffer(address);
}

void on_signal(int signal, siginfo_t* info, void* context) {
    if (signal == SIGVTALRM && !(machine && machine->running)) return;
    if (!machine || !machine->running) {  // not ours: back to whoever was there before
        sigaction(signal, &previous[signal], nullptr);
        return;
    }
    if (signal == SIGFPE) end_launch(here() + "integer division by zero");
    if (signal == SIGVTALRM)
        end_launch(here() + "no end after " + std::to_string(machine->launch->seconds) +
                   " s of CPU time: an endless loop?");
    bool writes = false;
#if defined(__x86_64__)
    writes = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2;
#endif
    (void)context;
    end_launch(here() + describe_fault(info, writes));
}

constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
constexpr size_t signal_stack_bytes = 256 << 10;

Machine* this_machine() {
    static const bool installed = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int s : signals) sigaction(s, &action, &previous[s]);
        return true;
    }();
    (void)installed;
    if (!machine) {
        owned_machine = std::make_unique<Machine>();
        machine = owned_machine.get();
    }
    return machine;
}

Machine::Machine() {
    signal_stack = map_memory(signal_stack_bytes, PROT_READ | PROT_WRITE);
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGVTALRM;
    event.sigev_notify_thread_id = static_cast<int>(syscall(SYS_gettid));
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &watchdog);
}

Machine::~Machine() {
    machine = nullptr;  // for a signal that comes now
    timer_delete(watchdog);
    for (Fiber& f : fibers)
        if (f.stack) munmap(f.stack - page, page + stack_bytes);
    if (shared_pages) munmap(shared_pages, shared_capacity + page);
    munmap(signal_stack, signal_stack_bytes);
}

void set_watchdog(const Machine& m, double seconds) {
    itimerspec t = {};
    t.it_value.tv_sec = static_cast<time_t>(seconds);
    t.it_value.tv_nsec = static_cast<long>((seconds - static_cast<double>(t.it_value.tv_sec)) * 1e9);
    timer_settime(m.watchdog, 0, &t, nullptr);
}

}  // namespace

// ---- what kernels call

void fail(const char* format, ...) {
    char what[512];
    va_list rest;
    va_start(rest, format);
    vsnprintf(what, sizeof what, format, rest);
    va_end(rest);
    end_launch(here() + what);
}

uint32_t lane() { return machine->current->id % 32; }

uint32_t thread_number() { return machine->current->id; }
uint32_t thread_count() { return machine->size; }

void sleep_at(const char* what) {
    machine->current->waits_at = what;
    run_instead(next_thread());
}

void wake(uint32_t thread) { machine->push(&machine->fibers[thread]); }

std::string thread_name(uint32_t thread) { return name(machine->fibers[thread]); }
std::string place_of(uint32_t thread) { return name_of_block() + ", " + thread_name(thread) + ": "; }
bool pdl() { return machine->launch->pdl; }
bool has_waited_for_grid() { return machine->current->waited_for_grid; }
bool toss() { return machine->policy == Machine::any && machine->random.below(2); }
uint32_t one_of(uint32_t n) {
    Machine& m = *machine;
    return m.policy == Machine::any ? m.random.below(n) : m.policy == Machine::last_in ? n - 1 : 0;
}
unsigned char poison_byte() { return machine->poison; }
char* dynamic_begin() { return machine->shared; }
uint64_t dynamic_bytes() { return machine->launch->shared_bytes; }

const Slot* gather(const char* name, const void* value, uint32_t bytes, void (*combine)(Slot*)) {
    Machine& m = *machine;
    Warp& w = m.warps[m.current->id / 32];
    Slot* slots = w.slots[w.turn];
    memcpy(slots[m.current->id % 32].bytes, value, bytes);
    meet(w.rendezvous, name, [&] {
        if (combine) combine(slots);
        w.turn ^= 1;
    });
    return slots;
}

void block_barrier() {
    meet(machine->block, "__syncthreads", hopper_block_meets);
}

void yield() {
    Machine& m = *machine;
    // Threads that look at memory again and again may wait for what happens only when nobody can run.
    if (m.yields++ > m.alive) {
        m.yields = 0;
        hopper_progress();
    }
    m.push(m.current);
    run_instead(m.slot(m.head++));  // the longest waiting one, whatever the policy: this one may wait for any
}

void* dynamic_shared() { return machine->shared; }

uint32_t shared_address(const void* pointer) {
    const Machine& m = *machine;
    const char* p = static_cast<const char*>(pointer);
    if (p >= m.shared && p <= m.shared + m.launch->shared_bytes)
        return dynamic_base + static_cast<uint32_t>(p - m.shared);
    if (m.static_begin && p >= m.static_begin && p <= m.static_end)
        return static_base + static_cast<uint32_t>(p - m.static_begin);
    fail("shared_address of %p, which is not shared memory", pointer);
}

void* shared_pointer(uint32_t address, uint32_t bytes, const char* what) {
    const Machine& m = *machine;
    if (address % bytes) fail("%s at shared address %u, which is not %u-byte aligned", what, address, bytes);
    const bool is_static = address >= static_base;
    const uint64_t offset = address - (is_static ? static_base : dynamic_base);
    const uint64_t size = is_static ? static_cast<uint64_t>(m.static_end - m.static_begin) : m.launch->shared_bytes;
    if (address < dynamic_base || offset + bytes > size)
        fail("%s at byte %lld of %s shared memory, but it has %llu bytes", what,
             static_cast<long long>(address) - (is_static ? static_base : dynamic_base),
             is_static ? "static" : "dynamic", static_cast<unsigned long long>(size));
    return (is_static ? m.static_begin : m.shared) + offset;
}

void copy_start(uint32_t shared, const void* global, bool valid) {
    void* to = shared_pointer(shared, 16, "cp_async_16");
    check_aligned(global, 16, "cp_async_16 from");
    if (valid) static_cast<void>(*static_cast<const volatile char*>(global));  // an address that faults does so here
    memset(to, machine->poison, 16);
    Fiber& f = *machine->current;
    f.copies.push_back({to, global, valid, f.groups_committed});
}

void copy_commit() { machine->current->groups_committed++; }

void copy_wait(uint32_t groups_left) {
    Fiber& f = *machine->current;
    const auto due = [&](const Copy& c) { return c.group + groups_left < f.groups_committed; };
    for (const Copy& c : f.copies) {
        if (!due(c)) continue;
        if (c.valid) memcpy(c.to, c.from, 16);
        else memset(c.to, 0, 16);
    }
    f.copies.erase(std::remove_if(f.copies.begin(), f.copies.end(), due), f.copies.end());
}

void grid_wait() { machine->current->waited_for_grid = machine->any_waited_for_grid = true; }

void touch_activation(const char* what) {
    if (machine->launch->pdl && !machine->current->waited_for_grid) fail("%s before pdl_wait", what);
}

float float_of_f16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                            : exponent     ? ldexpf(static_cast<float>(fraction + 1024), exponent - 25)
                                           : ldexpf(static_cast<float>(fraction), -24);
    return bits >> 15 ? -magnitude : magnitude;
}

uint16_t f16_of_float(float v) {
    if (v != v) return 0x7fff;
    const uint16_t sign = signbit(v) ? 0x8000 : 0;
    const float magnitude = fabsf(v);
    if (magnitude == 0.0f) return sign;
    if (magnitude >= 65520.0f) return sign | 0x7c00;  // halfway to the first value beyond 65504
    int exponent;
    frexpf(magnitude, &exponent);
    const int step = std::max(exponent - 11, -24);  // the value is a multiple of 2^step after rounding
    const int multiple = static_cast<int>(nearbyintf(ldexpf(magnitude, -step)));
    // A carry out of the fraction raises the exponent field by itself.
    return sign | static_cast<uint16_t>(((step + 24) << 10) + multiple);
}

// ---- matrix fragments

namespace {

template <class T> T& as(Slot& slot) { return *reinterpret_cast<T*>(slot.bytes); }

template <float (*convert)(uint16_t)> void multiply(Slot* lanes) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const MmaOperands& o = as<MmaOperands>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 2; i++) {
            const int shift = 16 * i;
            for (int r = 0; r < 4; r++)
                a[g + 8 * (r & 1)][2 * t + i + 8 * (r >> 1)] = convert(o.a[r] >> shift & 0xffff);
            for (int r = 0; r < 2; r++) b[2 * t + i + 8 * r][g] = convert(o.b[r] >> shift & 0xffff);
            for (int r = 0; r < 2; r++) c[g + 8 * r][2 * t + i] = o.c[2 * r + i];
        }
    }
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) c[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) as<float[4]>(lanes[lane])[i] = c[g + 8 * (i >> 1)][2 * t + (i & 1)];
    }
}

void load_four_matrices(Slot* lanes, bool transposed) {
    uint16_t element[32][8];
    for (int row = 0; row < 32; row++)
        memcpy(element[row], shared_pointer(as<uint32_t>(lanes[row]), 16, "ldmatrix"), 16);
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int m = 0; m < 4; m++) {
            const auto matrix = element + 8 * m;
            const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
            const uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            as<uint32_t[4]>(lanes[lane])[m] = low | high << 16;
        }
    }
}

}  // namespace

void mma_bf16(Slot* lanes) { multiply<float_of_bf16>(lanes); }
void mma_f16(Slot* lanes) { multiply<float_of_f16>(lanes); }
void load_matrices(Slot* lanes) { load_four_matrices(lanes, false); }
void load_matrices_transposed(Slot* lanes) { load_four_matrices(lanes, true); }

// ---- what Python calls

struct Buffer {
    char* pages;
    uint64_t page_bytes;
    char* data;
    uint64_t bytes;
};

// Memory for an array of `bytes` bytes that ends where an unmapped range begins (up to alignment: its address is
// `phase` modulo 16) and has another one before it. What surrounds it in its pages is 0xff.
extern "C" void emulation_buffer_new(uint64_t bytes, uint64_t phase, Buffer* out) {
    out->page_bytes = whole_pages(bytes + 15);
    out->pages = map_memory(guard_bytes + out->page_bytes + guard_bytes, PROT_NONE) + guard_bytes;
    mprotect(out->pages, out->page_bytes, PROT_READ | PROT_WRITE);
    memset(out->pages, 0xff, out->page_bytes);
    char* last = out->pages + out->page_bytes - bytes;
    out->data = last - (reinterpret_cast<uintptr_t>(last) - phase) % 16;
    out->bytes = bytes;
}

extern "C" void emulation_buffer_read_only(const Buffer* b) { mprotect(b->pages, b->page_bytes, PROT_READ); }

// Whether bytes around the array have been written.
extern "C" int emulation_buffer_damaged(const Buffer* b) {
    const auto changed = [](char c) { return c != '\xff'; };
    return std::any_of(b->pages, b->data, changed) ||
           std::any_of(b->data + b->bytes, b->pages + b->page_bytes, changed);
}

extern "C" void emulation_buffer_free(const Buffer* b) {
    munmap(b->pages - guard_bytes, guard_bytes + b->page_bytes + guard_bytes);
}

// Runs a kernel; 0, or 1 with the reason in launch->message.
extern "C" int emulation_launch(const Launch* launch) {
    Machine& m = *this_machine();
    m.prepare(*launch);
    // Faults are handled on a stack of their own: the fault may be that a fiber's stack is full.
    stack_t own = {}, before;
    own.ss_sp = m.signal_stack;
    own.ss_size = signal_stack_bytes;
    sigaltstack(&own, &before);
    const int failed = sigsetjmp(m.escape, 1);
    if (!failed) {
        m.running = true;
        set_watchdog(m, launch->seconds);
        m.run_blocks();
    }
    set_watchdog(m, 0);
    m.running = false;
    sigaltstack(&before, nullptr);
    return failed;
}

}  // namespace emulation
