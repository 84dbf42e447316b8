// The parts of prefill_attention_hopper.cu that compute nothing: sizes, shared memory, and the warp that loads.
#pragma once

constexpr int warpgroups = HEAD_DIM == 64 ? 3 : 2;  // that compute
constexpr int key_block = HEAD_DIM == 256 ? 64 : 128;
constexpr int stages = HEAD_DIM == 64 ? 3 : 2;  // blocks of keys, and of values, in shared memory
constexpr int query_slots = HEAD_DIM == 256 ? 1 : 2;
constexpr int consumer_registers = warpgroups == 2 ? 232 : 160, loader_registers = warpgroups == 2 ? 40 : 32;

// Where there are registers for an item's queries, every product reads one operand less from shared memory.
constexpr bool queries_in_registers = HEAD_DIM > 64 && HEAD_DIM <= 128;

constexpr int rows = 64 * warpgroups;
constexpr int warpgroup_size = 4 * warp_size;
constexpr int threads = warpgroup_size * (1 + warpgroups);
// Panels of 64 elements; what the last one has beyond the head dimension arrives as zeros.
constexpr int panels = (HEAD_DIM + 63) / 64;
constexpr int value_columns = 64 * panels;
constexpr int panel_row_bytes = 128;
constexpr int query_panel_bytes = rows * panel_row_bytes, query_bytes = panels * query_panel_bytes;
constexpr int key_panel_bytes = key_block * panel_row_bytes, tile_bytes = panels * key_panel_bytes;

// A peak is raised only by more than this, for otherwise the sums of values are to be scaled: weights stay below 2^8,
// in floating point as good as below 1.
constexpr float peak_slack = 8.0f;
constexpr float log2_e = 1.4426950408889634f;

struct Problem {
    scalar_t* out;
    const float* sinks;
    const int* lookup_table;
    const int* work_list;
    int items, item_tokens, table_width, page_size, box_rows, pool_rows, n_heads, n_kv_heads, group, l2_bytes, window;
    float softcap;          // of CAPPED
    float score_factor;     // score = q k * this; under soft-capping already divided by the cap
    float exponent_factor;  // log2(weight) = capped score, or q k if there is no cap, * this
};

struct Item {
    int request;
    int kv_head;
    int first_row;  // of q and out: that of the first token
    int tokens;     // 0: there are no more items
    int position;   // of the first token in its sequence
    int length;     // keys of the sequence
    int top_block, bottom_block;  // blocks are walked from one to the other
    int first_whole, last_whole;  // blocks that all rows see all of

    __device__ __forceinline__ int last_position() const { return position + tokens - 1; }
    __device__ __forceinline__ int first_key(int window) const { return max(0, position - window + 1); }
};

// ---- shared memory, by shared address

constexpr int barriers_at = query_slots * query_bytes + 2 * stages * tile_bytes;
// Those of items that loading has begun for, and one that is about to be stored.
constexpr int item_slots = query_slots + 1;
constexpr int items_at = barriers_at + 8 * (2 * query_slots + 4 * stages);
static_assert(query_panel_bytes % 1024 == 0 && key_panel_bytes % 1024 == 0, "swizzled in groups of 1024 bytes");

// A ring of buffers, each with a barrier that says it is full and one that says it is empty, behind one another.
template <int slots, int bytes> struct Ring {
    u32 data, barriers;

    __device__ __forceinline__ u32 buffer(int i) const { return data + i % slots * bytes; }
    __device__ __forceinline__ u32 full(int i) const { return barriers + i % slots * 16; }
    __device__ __forceinline__ u32 empty(int i) const { return full(i) + 8; }

    __device__ __forceinline__ void init() const {
        for (int i = 0; i < slots; i++) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), 4 * warpgroups);  // a warp each
        }
    }
    // For the i-th use of the ring.
    __device__ __forceinline__ void wait_full(int i) const { barrier_wait(full(i), i / slots & 1); }
    __device__ __forceinline__ void wait_empty(int i) const { barrier_wait(empty(i), i / slots & 1 ^ 1); }
    __device__ __forceinline__ void release(int i) const {
        if (lane_id() == 0) barrier_arrive(empty(i));
    }
};

struct Shared {
    Ring<query_slots, query_bytes> queries;
    Ring<stages, tile_bytes> keys, values;
    Item* items;

    __device__ __forceinline__ Shared() {
        const u32 base = shared_address(dynamic_shared());
        queries = {base, base + barriers_at};
        keys = {base + query_slots * query_bytes, queries.barriers + 16 * query_slots};
        values = {keys.data + stages * tile_bytes, keys.barriers + 16 * stages};
        items = reinterpret_cast<Item*>(dynamic_shared() + items_at);
    }
    __device__ __forceinline__ void init() const {
        queries.init();
        keys.init();
        values.init();
        barrier_init_fence();
    }
};

// ---- the loader: one warp

struct Loader {
    const Problem& p;
    const Shared& shared;
    const TensorMap& q;
    const TensorMap& pages;
    int queries = 0, blocks = 0;  // loaded so far
    int heads = 1;                // whose items are done at the same time

    __device__ __forceinline__ void run() {
        async_global_fence();
        const int total = p.items * p.n_kv_heads;
        choose_heads();
        // Items come longest first. Every other round goes through the blocks of threads backwards, so that the ones
        // with the longer item of a round get the shorter one of the next.
        for (int round = 0; round * static_cast<int>(gridDim.x) < total; round++) {
            const int place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
            const int index = round * gridDim.x + place;
            if (index < total) load(read_item(index));
        }
        pass_on(Item{});
        if (lane_id() == 0) barrier_arrive(shared.queries.full(queries));
    }

    // Keys and values of the heads whose items are done at the same time should stay in L2, for blocks of threads are
    // soon so far apart that they do not read the same ones together.
    __device__ __forceinline__ void choose_heads() {
        const uint4 entry = load_activation(p.work_list);  // the one with the most keys
        const int keys = static_cast<int>(entry.z) + min(p.item_tokens, static_cast<int>(entry.w));
        const i64 head_bytes = 2 * 2 * HEAD_DIM * static_cast<i64>(min(keys, p.window));
        heads = p.n_kv_heads;
        while (heads > 1 && (heads * head_bytes > p.l2_bytes || p.n_kv_heads % heads != 0)) heads--;
    }

    // All items of some heads, then all of the next ones, and of each in turn from the shortest to the longest and from
    // the longest to the shortest, so that items that are done at the same time are equally long; last the shortest.
    __device__ __forceinline__ Item read_item(int index) const {
        const int section = index / (p.items * heads), place = index % (p.items * heads);
        const bool shortest_first = (p.n_kv_heads / heads - 1 - section) % 2 != 0;
        const int number = shortest_first ? p.items - 1 - place / heads : place / heads;
        const uint4 entry = load_activation(p.work_list + number * 4);
        const int left = entry.w;  // tokens of the request from here on
        Item item;
        item.request = entry.x;
        item.first_row = entry.y;
        item.position = entry.z;
        item.tokens = item.request < 0 ? 0 : min(p.item_tokens, left);
        item.length = item.position + left;
        item.kv_head = section * heads + place % heads;
        item.top_block = item.last_position() / key_block;
        item.bottom_block = item.first_key(p.window) / key_block;
        item.first_whole = (max(0, item.last_position() - p.window + 1) + key_block - 1) / key_block;
        item.last_whole = (item.position + 1) / key_block - 1;
        return item;
    }

    __device__ __forceinline__ void pass_on(const Item& item) const {
        shared.queries.wait_empty(queries);
        if (lane_id() == 0) shared.items[queries % item_slots] = item;
    }

    __device__ __forceinline__ void load(const Item& item) {
        if (item.tokens <= 0) return;
        int block = item.top_block;
        int row = pool_row(item, block);
        pass_on(item);
        load_queries(item);
        for (; block >= item.bottom_block; block--) {
            const int values_row = row + p.n_kv_heads * p.page_size;
            load_tile(shared.keys, row);
            if (block > item.bottom_block) row = pool_row(item, block - 1);  // the look-up takes its time
            load_tile(shared.values, values_row);
            blocks++;
        }
    }

    __device__ __forceinline__ void load_queries(const Item& item) {
        if (lane_id() == 0) {
            const u32 full = shared.queries.full(queries);
            barrier_arrive_expect(full, p.item_tokens * p.group * panel_row_bytes * panels);
#pragma unroll
            for (int i = 0; i < panels; i++)
                tensor_copy(shared.queries.buffer(queries) + i * query_panel_bytes, q, full, 64 * i,
                            item.kv_head * p.group, item.first_row);
        }
        queries++;
    }

    // A block arrives in boxes of rows that never straddle a page: each lane brings one panel of one of them. This is
    // the row of the pool of pages, all keys and values of all heads one below the other, where the lane's box begins:
    // behind the last one, from where zeros come, if no row sees the box, for its entry in the table may be anything.
    __device__ __forceinline__ int pool_row(const Item& item, int block) const {
        const int key = block * key_block + lane_id() / panels * p.box_rows;
        if (key > item.last_position() || key + p.box_rows <= item.first_key(p.window)) return p.pool_rows;
        const int page = key / p.page_size;
        const int* table = p.lookup_table + static_cast<i64>(item.request) * p.table_width;
        const int number = load_activation_element(table + page);
        return (number * 2 * p.n_kv_heads + item.kv_head) * p.page_size + key - page * p.page_size;
    }

    __device__ __forceinline__ void load_tile(const Ring<stages, tile_bytes>& ring, int row) const {
        ring.wait_empty(blocks);
        if (lane_id() == 0) barrier_arrive_expect(ring.full(blocks), tile_bytes);
        __syncwarp();
        const int box = lane_id() / panels, panel = lane_id() % panels;
        if (box * p.box_rows < key_block)
            tensor_copy(ring.buffer(blocks) + panel * key_panel_bytes + box * p.box_rows * panel_row_bytes, pages,
                        ring.full(blocks), 64 * panel, min(row, p.pool_rows));
    }
};
