// y[M,N] = x[M,K] W[N,K]^T (+ bias[N]) for few rows of x on Hopper, at the rate at which W can be read, and so made
// that products that follow each other overlap: the weights of the next are on their way before its x exists.
// Specification: linear.py.
//
// A block, of which a multiprocessor has room for one, streams pieces of `rows` rows of W, and x beside them,
// through a ring of stages in shared memory; a stage holds `panels` panels of 64 elements of K of both. One thread
// starts the copies, one for W and one for x in each stage, and runs ahead as far as the ring is long, over the borders
// of pieces; two warpgroups multiply, W being the operand with 64 rows per instruction, the rows of x the columns of
// the product. They wait for the products of a stage and give it back at once: together they are much faster than
// memory. Each kernel lets the next one start at once. So when a block ends, one of the next product comes to its
// multiprocessor and fills its ring with weights, while other blocks and the small kernels between the two products
// are still at work (`pdl_wait`): memory is not idle meanwhile.
//
// Where `rows` is no multiple of 64, the last group of an operand reaches into what follows in shared memory, and so do
// the COLUMNS rows of x where `x_rows` are less; the rows and columns of the product that come of it are not stored. What
// a box has outside W or x arrives as zeros, but slowly: with 40 of 64 rows of x in a box, a product took half as long
// again.
//
// An instruction waits for the one before if it adds to the same sums, about as long as four of them take. So where a
// piece has fewer than four groups of 64 rows, a result has SPLITS sums, which take turns in K, 16 elements each, and
// are added at the end. The order is that of K and of these: the bits of an output depend on SPLITS, which the launcher
// chooses by the number of rows of W alone, and neither on COLUMNS and GROUPS nor on rows, panels and stages. Each
// warpgroup has half of the rows of a piece if these are several groups, else half of the sums of every result.
//
// GATED: W has rows of gates and then as many of ups, and y = act(gate) * up with the roundings of
// activation.py: a piece is `rows` rows of each, in separate groups, so that one thread has a gate and its up.
//
// archs: sm_90a
// variants: DTYPE=BF16,F16 COLUMNS=8,16,32,64,96 GROUPS=1 SPLITS=4
// variants: DTYPE=BF16,F16 COLUMNS=8,16,32,64,96 GROUPS=2 SPLITS=2
// variants: DTYPE=BF16,F16 COLUMNS=8,16,32,64,96,128 GROUPS=4 SPLITS=1
// variants: DTYPE=BF16,F16 COLUMNS=8,16 GROUPS=2 SPLITS=2,4 GATED
// variants: DTYPE=BF16,F16 COLUMNS=8,16 GROUPS=4 SPLITS=1 GATED
#include "device.cuh"
#include "hopper.cuh"
#include "activation.cuh"

#ifdef GATED
constexpr int parts = 2;  // of W that a piece has rows of
#else
constexpr int parts = 1;
#endif

constexpr int row_bytes = 128;  // of a panel
constexpr int group_rows = 64;  // of an operand of one instruction
constexpr int slices = 4;       // of a row of a panel, 16 elements of K for one instruction
constexpr int slice_bytes = row_bytes / slices;

constexpr int warpgroups = 2;
constexpr int warpgroup_threads = 128;
constexpr int multiplying_warps = warpgroups * warpgroup_threads / warp_size;
constexpr int threads = (multiplying_warps + 1) * warp_size;
// What a warpgroup has of a piece: groups of each part, and sums of a result.
constexpr bool rows_are_shared_out = GROUPS / parts > 1;
constexpr int own_groups = rows_are_shared_out ? GROUPS / warpgroups : GROUPS;
constexpr int own_sums = rows_are_shared_out ? SPLITS : SPLITS / warpgroups;
static_assert(own_groups % parts == 0 && own_sums > 0, "work for each warpgroup");

__device__ __forceinline__ int warpgroup_id() { return threadIdx.x / warpgroup_threads; }

// The shape of the product and how it is cut up. n: columns of y. rows: of each part of W in a piece, a multiple of 8.
// x_rows: of x in a stage, the next multiple of 8 from m on.
struct Shape {
    int m, n, k_panels, rows, x_rows, panels, stages;

    __device__ __forceinline__ int pieces_of_block() const {
        const int pieces = (n + rows - 1) / rows;
        return (pieces - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
    }
    __device__ __forceinline__ int steps_of_piece() const { return (k_panels + panels - 1) / panels; }
    // From one piece of the block to the next.
    __device__ __forceinline__ int piece_distance() const { return gridDim.x * rows; }
    __device__ __forceinline__ u32 part_bytes() const { return panels * rows * row_bytes; }
    __device__ __forceinline__ u32 x_panel_bytes() const { return x_rows * row_bytes; }
    __device__ __forceinline__ u32 stage_bytes() const { return parts * part_bytes() + panels * x_panel_bytes(); }
};

// Sums that pass from one warpgroup to the other at a time, in each of its threads, and where.
constexpr int exchanged = COLUMNS / 2 < 8 ? COLUMNS / 2 : 8;
constexpr int exchange_bytes = rows_are_shared_out ? 0 : exchanged * warpgroup_threads * sizeof(float);

// Stages in shared memory, each with its panels of the parts of W, one part after the other, and then of x; and two
// barriers for each: for the arrival of the data and for the end of their use.
struct Ring {
    u32 data, barriers;

    // Behind what the last operand may reach into lie sums on their way between the warpgroups, and then the barriers.
    __device__ __forceinline__ explicit Ring(u32 shared_bytes, const Shape& shape)
        : data(shared_address(dynamic_shared())), barriers(data + shared_bytes - 16 * shape.stages) {}
    __device__ __forceinline__ float* exchange() const {
        return reinterpret_cast<float*>(dynamic_shared() + (barriers - data - exchange_bytes));
    }
    __device__ __forceinline__ u32 full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ u32 empty(int stage) const { return barriers + 16 * stage + 8; }
    __device__ __forceinline__ u32 weight(int stage, const Shape& shape) const {
        return data + stage * shape.stage_bytes();
    }
    __device__ __forceinline__ u32 x(int stage, const Shape& shape) const {
        return weight(stage, shape) + parts * shape.part_bytes();
    }
};

// Barriers' arrivals: one copying thread, and a lane of each multiplying warp.
__device__ __forceinline__ void init_barriers(const Ring& ring, int stages) {
#pragma unroll 1
    for (int stage = 0; stage < stages; stage++)
        barrier_init(ring.full(stage), 1), barrier_init(ring.empty(stage), multiplying_warps);
    barrier_init_fence();
}

// ---- copies, by one thread

// What the next copy brings: rows of W from `row` on, panels of K from `panel` on.
struct Place {
    int row, panel = 0;

    __device__ __forceinline__ void advance(const Shape& shape) {
        panel += shape.panels;
        if (panel >= shape.k_panels) panel = 0, row += shape.piece_distance();
    }
};

struct Copies {
    const TensorMap& weight_map;
    const TensorMap& x_map;
    const Shape& shape;
    const Ring& ring;

    __device__ __forceinline__ Place first() const { return {static_cast<int>(blockIdx.x) * shape.rows}; }
    __device__ __forceinline__ void weight(Place at, int stage) const {
        barrier_arrive_expect(ring.full(stage), shape.stage_bytes());
#pragma unroll
        for (int part = 0; part < parts; part++)
            tensor_copy_streamed(ring.weight(stage, shape) + part * shape.part_bytes(), weight_map, ring.full(stage), 0,
                                 at.row + part * shape.n, at.panel);
    }
    __device__ __forceinline__ void x(Place at, int stage) const {
        tensor_copy(ring.x(stage, shape), x_map, ring.full(stage), 0, 0, at.panel);
    }
};

// Fills the ring with weights: what may happen before the kernel before has ended.
__device__ __forceinline__ void begin_copies(const Copies& copies, int steps) {
    const int stages = copies.shape.stages;
    Place at = copies.first();
#pragma unroll 1
    for (int step = 0; step < min(stages, steps); step++, at.advance(copies.shape)) copies.weight(at, step);
}

// Brings x into the ring, and then more of both.
__device__ __forceinline__ void go_on_copying(const Copies& copies, int steps) {
    const int stages = copies.shape.stages;
    async_global_fence();
    Place at = copies.first();
#pragma unroll 1
    for (int step = 0; step < min(stages, steps); step++, at.advance(copies.shape)) copies.x(at, step);
    int stage = 0;
    u32 parity = 0;
#pragma unroll 1
    for (int step = stages; step < steps; step++, at.advance(copies.shape)) {
        barrier_wait(copies.ring.empty(stage), parity);
        copies.weight(at, stage);
        copies.x(at, stage);
        if (++stage == stages) stage = 0, parity ^= 1;
    }
}

// ---- products, by the warpgroups

// As descriptor_at, in 32 bits: the address is in the low half, and no sum of addresses leaves it.
__device__ __forceinline__ u64 operand_at(u64 descriptor, u32 bytes) {
    return (descriptor & ~0xffffffffull) | (static_cast<u32>(descriptor) + (bytes >> 4));
}

// This warpgroup's operands in the stage that comes next.
struct Operands {
    u64 weight, x;
    u32 stage_bytes, ring_bytes, offset = 0;  // of the stage
    u32 barrier, first_barrier, parity = 0;

    __device__ __forceinline__ Operands(const Ring& ring, const Shape& shape)
        : stage_bytes(shape.stage_bytes()), ring_bytes(shape.stages * stage_bytes), barrier(ring.full(0)),
          first_barrier(barrier) {
        // The first of its rows, or of its slices. The shuffle tells the compiler that all lanes have the same.
        const u32 warpgroup = shuffle(warpgroup_id(), 0);
        const u32 row = rows_are_shared_out ? warpgroup * (own_groups / parts * group_rows * row_bytes) : 0;
        const u32 slice = rows_are_shared_out ? 0 : warpgroup * (own_sums * slice_bytes);
        weight = matrix_descriptor(ring.weight(0, shape) + row + slice, 16, 8 * row_bytes);
        x = matrix_descriptor(ring.x(0, shape) + slice, 16, 8 * row_bytes);
    }
    __device__ __forceinline__ void advance() {
        offset += stage_bytes, barrier += 16;
        if (offset == ring_bytes) offset = 0, barrier = first_barrier, parity ^= 1;
    }
};

struct Sums {
    float of[own_groups][own_sums][COLUMNS / 2];

    __device__ __forceinline__ void keep() {
#pragma unroll
        for (int i = 0; i < own_groups * own_sums; i++) keep_registers(of[i / own_sums][i % own_sums]);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < own_groups * own_sums; i++)
#pragma unroll
            for (int value = 0; value < COLUMNS / 2; value++) of[i / own_sums][i % own_sums][value] = 0;
    }
    // Starts to add the products of a panel: of slice i to sum i % SPLITS of the result.
    __device__ __forceinline__ void add(u64 weight, u64 x, u32 part_bytes) {
#pragma unroll
        for (int i = 0; i < slices * own_sums / SPLITS; i++)
#pragma unroll
            for (int group = 0; group < own_groups; group++) {
                const u32 distance = group % parts * part_bytes + group / parts * group_rows * row_bytes;
                const u32 slice = (i / own_sums * SPLITS + i % own_sums) * slice_bytes;
                wgmma_shared<scalar_t, COLUMNS, false>(of[group][i % own_sums], operand_at(weight, distance + slice),
                                                       operand_at(x, slice), true);
            }
    }
    // Adds up this warpgroup's sums of each result, in the first of them.
    __device__ __forceinline__ void total() {
        static_assert(own_sums <= 2, "a longer sum");
        if constexpr (own_sums == 2)
#pragma unroll
            for (int group = 0; group < own_groups; group++)
#pragma unroll
                for (int i = 0; i < COLUMNS / 2; i++) of[group][0][i] += of[group][1][i];
    }
    // Adds the totals of the second warpgroup to those of the first, by named barrier 1.
    __device__ __forceinline__ void join(float* exchange) {
        const int thread = threadIdx.x % warpgroup_threads;
#pragma unroll
        for (int group = 0; group < own_groups; group++)
#pragma unroll
            for (int first = 0; first < COLUMNS / 2; first += exchanged) {
                named_barrier_sync(1, warpgroups * warpgroup_threads);  // those before have been read
                if (warpgroup_id() == 1)
#pragma unroll
                    for (int i = 0; i < exchanged; i++)
                        exchange[i * warpgroup_threads + thread] = of[group][0][first + i];
                named_barrier_sync(1, warpgroups * warpgroup_threads);
                if (warpgroup_id() == 0)
#pragma unroll
                    for (int i = 0; i < exchanged; i++)
                        of[group][0][first + i] += exchange[i * warpgroup_threads + thread];
            }
    }
};

// Adds the products of all steps of a piece, and gives the stages back. `panels` is known to the compiler, which starts
// a stage's products without a branch among them.
template <int panels>
__device__ __forceinline__ void multiply(Sums& sums, Operands& operands, const Shape& shape) {
    const u32 part_bytes = shape.part_bytes(), panel_bytes = shape.rows * row_bytes;
    const u32 x_panel_bytes = shape.x_panel_bytes();
#pragma unroll 1
    for (int step = 0, steps = shape.steps_of_piece(); step < steps; step++) {
        const u64 weight = operand_at(operands.weight, operands.offset), x = operand_at(operands.x, operands.offset);
        const u32 full = operands.barrier;
        barrier_wait(full, operands.parity);
        sums.keep();
        wgmma_fence();
#pragma unroll
        for (int panel = 0; panel < panels; panel++)
            sums.add(operand_at(weight, panel * panel_bytes), operand_at(x, panel * x_panel_bytes), part_bytes);
        wgmma_commit();
        operands.advance();
        wgmma_wait<0>();
        if (lane_id() == 0) barrier_arrive(full + 8);
    }
    sums.keep();
}

__device__ __forceinline__ void multiply(Sums& sums, Operands& operands, const Shape& shape) {
    if (shape.panels == 1) multiply<1>(sums, operands, shape);
    else if (shape.panels == 2) multiply<2>(sums, operands, shape);
    else if (shape.panels == 4) multiply<4>(sums, operands, shape);
    else multiply<8>(sums, operands, shape);
}

// This thread has two rows of each group, and of them an even and an odd column of each 8.
__device__ __forceinline__ int row_of_thread(int group, int half) {
    const int first = rows_are_shared_out ? warpgroup_id() * (own_groups / parts * group_rows) : 0;
    return first + group / parts * group_rows + half * 8 + warp_id() % 4 * 16 + lane_id() / 4;
}
__device__ __forceinline__ int column_of_thread(int i) { return i / 2 * 8 + lane_id() % 4 * 2 + i % 2; }
__device__ __forceinline__ constexpr int place_in_sums(int half, int column) {
    return column / 2 * 4 + half * 2 + column % 2;
}

// The bias of this thread's rows of a piece.
struct Bias {
    float of[own_groups][2] = {};

    __device__ __forceinline__ void load(const scalar_t* bias, int first_row, const Shape& shape) {
        if (bias == nullptr) return;
#pragma unroll
        for (int i = 0; i < own_groups * 2; i++) {
            const int group = i / 2, half = i % 2, row = first_row + row_of_thread(group, half);
            if (row < shape.n) of[group][half] = to_float(bias[group % parts * shape.n + row]);
        }
    }
};

// What becomes of the sums.
struct Output {
    void* y;
    i64 y_stride;
    int float_out, activation;
    float limit;
};

// A value of y, from the totals of a group (and, GATED, the next one).
template <Activation kind>
__device__ __forceinline__ float result(const Sums& sums, const Bias& bias, const Output& out, int group, int half,
                                        int column) {
    const int i = place_in_sums(half, column);
    const float sum = sums.of[group][0][i] + bias.of[group][half];
    if constexpr (parts == 1) return sum;
    const float gate = rounded<scalar_t>(sum);
    const float up = rounded<scalar_t>(sums.of[group + parts - 1][0][i] + bias.of[group + parts - 1][half]);
    return rounded<scalar_t>(activated<kind>(clamped_gate(gate, out.limit))) * clamped_up(up, out.limit);
}

template <Activation kind>
__device__ __forceinline__ void store(const Sums& sums, const Bias& bias, const Output& out, int first_row,
                                      const Shape& shape) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; i++) {
        if (column_of_thread(i) >= shape.m) continue;
        const i64 first = column_of_thread(i) * out.y_stride + first_row;
#pragma unroll
        for (int group = 0; group < own_groups; group += parts)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = row_of_thread(group, half);
                if (row >= shape.rows || first_row + row >= shape.n) continue;
                const float v = result<kind>(sums, bias, out, group, half, i);
                if (out.float_out) static_cast<float*>(out.y)[first + row] = v;
                else static_cast<scalar_t*>(out.y)[first + row] = from_float<scalar_t>(v);
            }
    }
}

__device__ __forceinline__ void store(const Sums& sums, const Bias& bias, const Output& out, int first_row,
                                      const Shape& shape) {
    if (parts == 1 || out.activation == SILU) store<SILU>(sums, bias, out, first_row, shape);
    else store<GELU_TANH>(sums, bias, out, first_row, shape);
}

// weight_map: of W [parts * n, k] seen as [k / 64, parts * n, 64], boxes of [panels, rows, 64]; x_map: of x [m, k] in
// the same way, boxes of [panels, x_rows, 64]; bias [parts * n] or null; y: m rows of n elements, y_stride apart,
// float if `float_out`. k_panels: k / 64. panels: 1, 2, 4 or 8. activation (SILU or GELU_TANH) and limit: of GATED.
// shared_bytes: the size of the dynamic shared memory, with which a multiprocessor has room for one block.
extern "C" __global__ void __launch_bounds__(threads, 1)
stream_gemm(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
            const scalar_t* bias, void* y, int m, int n, int k_panels, i64 y_stride, int float_out, int rows,
            int x_rows, int panels, int stages, int shared_bytes, int activation, float limit) {
    pdl_launch_dependents();
    const Shape shape{m, n, k_panels, rows, x_rows, panels, stages};
    const Ring ring(shared_bytes, shape);
    const int pieces = shape.pieces_of_block(), steps = pieces * shape.steps_of_piece();
    if (warp_id() == multiplying_warps) {
        const Copies copies{weight_map, x_map, shape, ring};
        if (lane_id() == 0) {
            tensor_map_prefetch(weight_map);
            init_barriers(ring, stages);
            begin_copies(copies, steps);
            tensor_map_prefetch(x_map);
        }
        __syncthreads();
        pdl_wait();
        if (lane_id() == 0) go_on_copying(copies, steps);
        return;
    }

    __syncthreads();
    const Output out{y, y_stride, float_out, activation, limit};
    Sums sums;
    Operands operands(ring, shape);
    for (int piece = 0, first_row = blockIdx.x * rows; piece < pieces; piece++, first_row += shape.piece_distance()) {
        Bias bias_of_rows;
        bias_of_rows.load(bias, first_row, shape);
        if (piece == 0) pdl_wait();  // rather than polling for x, which comes after it
        sums.clear();
        multiply(sums, operands, shape);
        sums.total();
        if (!rows_are_shared_out) {
            sums.join(ring.exchange());
            if (warpgroup_id() == 1) continue;
        }
        store(sums, bias_of_rows, out, first_row, shape);
    }
}
