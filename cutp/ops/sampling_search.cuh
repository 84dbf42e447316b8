// The search for a row's threshold (sampling_thresholds.py), digit by digit: what sampling_logits.cu counts for, and
// sampling_records.cu brings forward.
#pragma once
#include "device.cuh"

// What is known of a row's threshold while the digits of its key are being searched, from the highest one on.
enum Measure : u32 { done, by_count, by_mass };
struct Measures {
    u64 count, mass;
};
struct Search {
    Measures above;  // of the tokens whose key is greater than `prefix` with any further digits
    u64 target;      // the tokens at or above the threshold have at least this count, or mass
    u32 prefix;      // the digits found
    u32 level;       // how many they are
    u32 measure;
    u32 with_mass;   // whether top-p will need masses
};
static_assert(sizeof(Search) == 40, "the launcher's SEARCH_WORDS");

__device__ __forceinline__ Search load_search(const Search* p) {
    Search s;
    s.above.count = load_activation_element(&p->above.count);
    s.above.mass = load_activation_element(&p->above.mass);
    s.target = load_activation_element(&p->target);
    s.prefix = load_activation_element(&p->prefix);
    s.level = load_activation_element(&p->level);
    s.measure = load_activation_element(&p->measure);
    s.with_mass = load_activation_element(&p->with_mass);
    return s;
}

constexpr int digit_bits(int level) { return level == 2 ? 10 : 11; }
__device__ __forceinline__ int digit_shift(int level) { return level == 0 ? 21 : level == 1 ? 10 : 0; }
constexpr int most_bins = 1 << digit_bits(0);
