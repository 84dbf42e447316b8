// The wgmma part of runtime_hopper.h: products are noted when they are started, and computed when they are waited for.
#include <algorithm>

#include "hopper_block.h"

namespace emulation {

namespace {

uint32_t poison_word() {
    // A signalling NaN where unwritten memory is NaN: an operation on it changes its bits.
    return poison_byte() == 0xff ? 0x7fa5a5a5 : poison_byte() * 0x01010101u;
}

struct Operand {
    uint32_t begin, panel_distance, group_distance;

    Operand(uint64_t descriptor, const char* name, bool transposed, uint32_t panels) {
        begin = (descriptor & 0x3fff) << 4;
        panel_distance = (descriptor >> 16 & 0x3fff) << 4;
        group_distance = (descriptor >> 32 & 0x3fff) << 4;
        if (descriptor >> 62 != 1 || descriptor >> 46 & 0xffff)
            fail("wgmma: the descriptor of %s is not one of matrix_descriptor", name);
        if (begin & 0x380)
            fail("wgmma: %s begins at %s, in the middle of a group of 8 rows", name, byte_name(begin).c_str());
        if (begin % 128 > (transposed ? 0 : 96))
            fail("wgmma: %s begins at byte %u of rows of 128 bytes", name, begin % 128);
        if (group_distance % 1024 || (transposed && panels > 1 && panel_distance % 1024))
            fail("wgmma: the distances of %s are no multiples of 1024 bytes", name);
    }
};

// 8 consecutive elements as floats. `address` is as if there were no swizzle.
void load_eight(uint32_t address, const char* name, bool is_bf16, float* out) {
    static const std::vector<float> f16_table = [] {
        std::vector<float> table(65536);
        for (uint32_t i = 0; i < table.size(); i++) table[i] = float_of_f16(static_cast<uint16_t>(i));
        return table;
    }();
    const uint32_t offset = dynamic_offset(swizzled(address), 16, name);
    uint16_t bits[8];
    memcpy(bits, dynamic_begin() + offset, 16);
    if (memcmp(bits, &block().seen[offset], 16))
        fail("wgmma: %s includes byte %u of dynamic shared memory, which was stored to without async_shared_fence",
             name, offset);
    for (int i = 0; i < 8; i++) out[i] = is_bf16 ? float_of_bf16(bits[i]) : f16_table[bits[i]];
}

float half_of(uint32_t pair, int i, bool is_bf16) {
    const uint16_t bits = static_cast<uint16_t>(pair >> 16 * i);
    return is_bf16 ? float_of_bf16(bits) : float_of_f16(bits);
}

Accumulators* accumulators_at(Thread& t, const uint32_t* registers) {
    for (Accumulators& a : t.accumulators)
        if (a.registers == registers) return &a;
    return nullptr;
}

// D as a matrix, and the values of the threads that it stands for.
class Result {
    std::vector<float>* values[warpgroup] = {};
    const uint32_t* registers[warpgroup] = {};
    uint32_t n = 0;

    // Calls f(a value of a thread, its place in D) for all of D.
    template <class F> void each(F f) {
        auto& d = block().matrices.d;
        for (uint32_t t = 0; t < warpgroup; t++)
            for (uint32_t half = 0; half < 2; half++) {
                float* row = d[16 * (t / 32) + t % 32 / 4 + 8 * half] + 2 * (t % 4);
                float* of_thread = values[t]->data() + 2 * half;
                for (uint32_t i = 0; i < n / 8; i++)
                    for (uint32_t e = 0; e < 2; e++) f(of_thread[4 * i + e], row[8 * i + e]);
            }
    }

   public:
    void load(Thread* threads, size_t product) {
        bool same = true;
        for (uint32_t t = 0; t < warpgroup; t++)
            same = same && registers[t] == threads[t].products[product].accumulators;
        if (same) return;
        store();
        n = threads[0].products[product].n;
        for (uint32_t t = 0; t < warpgroup; t++) {
            registers[t] = threads[t].products[product].accumulators;
            values[t] = &accumulators_at(threads[t], registers[t])->values;
        }
        each([](float& value, float& place) { place = value; });
    }
    void store() {
        if (n) each([](float& value, float& place) { value = place; });
    }
};

void load_a(const Thread* threads, size_t product) {
    const StartedProduct& p = threads[0].products[product];
    auto& a = block().matrices.a;
    if (p.a_is_shared) {
        const Operand where(p.a, "A", false, 1);
        for (uint32_t row = 0; row < 64; row++)
            for (uint32_t half = 0; half < 2; half++)
                load_eight(where.begin + row / 8 * where.group_distance + row % 8 * 128 + half * 16, "A", p.is_bf16,
                           &a[row][8 * half]);
        return;
    }
    for (uint32_t t = 0; t < warpgroup; t++)
        for (uint32_t r = 0; r < 4; r++)
            for (int i = 0; i < 2; i++)
                a[16 * (t / 32) + t % 32 / 4 + r % 2 * 8][t % 4 * 2 + r / 2 * 8 + i] =
                    half_of(threads[t].products[product].a_registers[r], i, p.is_bf16);
}

void load_b(const StartedProduct& p) {
    const Operand where(p.b, "B", p.transposed_b, (p.n + 63) / 64);
    auto& b = block().matrices.b;
    if (p.transposed_b) {
        for (uint32_t k = 0; k < 16; k++)
            for (uint32_t i = 0; i < p.n; i += 8)
                load_eight(where.begin + i / 64 * where.panel_distance + k / 8 * where.group_distance + k % 8 * 128 +
                               i % 64 * 2, "B", p.is_bf16, &b[k][i]);
        return;
    }
    float eight[8];
    for (uint32_t i = 0; i < p.n; i++)
        for (uint32_t half = 0; half < 2; half++) {
            load_eight(where.begin + i / 8 * where.group_distance + i % 8 * 128 + half * 16, "B", p.is_bf16, eight);
            for (uint32_t k = 0; k < 8; k++) b[8 * half + k][i] = eight[k];
        }
}

#if defined(__x86_64__)
__attribute__((target_clones("avx2", "default")))
#endif
void multiply_add(uint32_t n, bool accumulate) {
    auto& [a, b, d] = block().matrices;
    for (uint32_t row = 0; row < 64; row++) {
        float* sums = d[row];
        if (!accumulate) std::fill(sums, sums + n, 0.0f);
        for (uint32_t k = 0; k < 16; k++) {
            const float factor = a[row][k], *others = b[k];
            for (uint32_t i = 0; i < n; i++) sums[i] += factor * others[i];
        }
    }
}

bool same_product(const StartedProduct& a, const StartedProduct& b) {
    return a.n == b.n && a.is_bf16 == b.is_bf16 && a.transposed_b == b.transposed_b && a.accumulate == b.accumulate &&
           a.a_is_shared == b.a_is_shared && a.a == b.a && a.b == b.b && a.group == b.group;
}

// Computes the products of the current warpgroup that belong to all groups but the last `groups_left`.
void finish_groups(uint32_t groups_left) {
    const uint32_t first = thread_number() / warpgroup * warpgroup;
    Thread* threads = &block().threads[first];
    for (uint32_t t = 1; t < warpgroup; t++) {
        const bool same = threads[t].groups == threads[0].groups &&
                          threads[t].products.size() == threads[0].products.size() &&
                          std::equal(threads[t].products.begin(), threads[t].products.end(),
                                     threads[0].products.begin(), same_product);
        if (!same)
            fail("wgmma_wait: %s and %s of one warpgroup have not started the same products",
                 thread_name(first).c_str(), thread_name(first + t).c_str());
    }
    const auto due = [&](const StartedProduct& p) { return p.group + groups_left < threads[0].groups; };
    Result result;
    for (size_t i = 0; i < threads[0].products.size(); i++) {
        if (!due(threads[0].products[i])) continue;
        result.load(threads, i);
        load_a(threads, i);
        load_b(threads[0].products[i]);
        multiply_add(threads[0].products[i].n, threads[0].products[i].accumulate);
        for (uint32_t t = 0; t < warpgroup; t++)
            accumulators_at(threads[t], threads[t].products[i].accumulators)->unfinished--;
    }
    result.store();
    for (uint32_t t = 0; t < warpgroup; t++) {
        std::vector<StartedProduct>& p = threads[t].products;
        p.erase(std::remove_if(p.begin(), p.end(), due), p.end());
    }
}

}  // namespace

uint64_t matrix_descriptor(uint32_t address, uint32_t panel_distance, uint32_t group_distance) {
    if (address >= 1 << 18) fail("matrix_descriptor of %s", byte_name(address).c_str());
    return (address & 0x3ffff) >> 4 | static_cast<uint64_t>((panel_distance & 0x3ffff) >> 4) << 16 |
           static_cast<uint64_t>((group_distance & 0x3ffff) >> 4) << 32 | 1ull << 62;
}

void keep_registers(void* registers, uint32_t count) {
    Thread& t = current();
    uint32_t* begin = static_cast<uint32_t*>(registers);
    for (size_t i = 0; i < t.accumulators.size();) {
        Accumulators& a = t.accumulators[i];
        if (a.unfinished || a.registers < begin || a.registers >= begin + count) {
            i++;
            continue;
        }
        for (size_t r = 0; r < a.values.size(); r++)
            if (a.registers[r] != poison_word()) fail("accumulator %zu was written to while wgmma worked on it", r);
        memcpy(a.registers, a.values.data(), 4 * a.values.size());
        t.accumulators.erase(t.accumulators.begin() + i);
    }
    auto kept = std::find_if(t.kept.begin(), t.kept.end(), [&](const Kept& k) { return k.registers == begin; });
    if (kept == t.kept.end()) kept = t.kept.insert(kept, Kept{begin, {}, 0});
    kept->values.assign(begin, begin + count);
    kept->time = ++block().time;
}

void wgmma_fence() { current().fence_time = ++block().time; }

void wgmma_start(void* accumulators, const Product& product) {
    this_warpgroup("wgmma");
    Thread& t = current();
    uint32_t* begin = static_cast<uint32_t*>(accumulators);
    const uint32_t count = product.n / 2;
    if (!t.fence_time) fail("wgmma without a wgmma_fence before it");
    Accumulators* a = accumulators_at(t, begin);
    if (!a) {
        const Kept* kept = nullptr;
        for (const Kept& k : t.kept)
            if (k.registers <= begin && begin + count <= k.registers + k.values.size())
                if (!kept || k.time > kept->time) kept = &k;
        if (!kept) fail("wgmma on accumulators that have not passed through keep_registers");
        if (kept->time > t.fence_time) fail("wgmma without wgmma_fence since its accumulators were in use");
        if (memcmp(begin, &kept->values[begin - kept->registers], 4 * count))
            fail("wgmma on accumulators that were written to after keep_registers");
        t.accumulators.push_back({begin, std::vector<float>(count), 0});
        a = &t.accumulators.back();
        memcpy(a->values.data(), begin, 4 * count);
        std::fill(begin, begin + count, poison_word());
    }
    if (a->values.size() != count) fail("wgmma on %u accumulators of which %zu are in use", count, a->values.size());
    a->unfinished++;
    t.products.push_back({product, begin, t.groups});
}

void wgmma_commit() { current().groups++; }

void wgmma_wait(uint32_t groups_left) {
    if (!meet_warpgroup("wgmma_wait", groups_left)) return;
    finish_groups(groups_left);
    release_warpgroup();
}

void wgmma_end_thread() {
    const Thread& t = current();
    if (!t.products.empty()) fail("leaves the kernel without waiting for its wgmma products");
    if (!t.accumulators.empty())
        fail("leaves the kernel with wgmma results that have not passed through keep_registers");
}

}  // namespace emulation
