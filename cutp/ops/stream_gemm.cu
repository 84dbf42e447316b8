// y[M,N] = x[M,K] W[N,K]^T (+ bias[N]) for few rows of x on Hopper, at the rate at which W can be read, and so made that
// products that follow each other overlap: the weights of the next are on their way before its x exists.
// Specification: linear.py.
//
// A block, of which there is at most one per multiprocessor, streams pieces of `rows` rows of W, and x beside them,
// through a ring of stages in shared memory; a stage holds `panels` panels of 64 elements of K of both. One thread starts
// the copies, one for W and one for x in each stage, and runs ahead as far as the ring is long, over the borders of
// pieces; one warpgroup multiplies, W being the operand with 64 rows per instruction, the rows of x the columns of the
// product. The ring is filled with weights before the kernel before has ended (`pdl_wait`), and since each kernel lets
// the next one start at once, while there is shared memory left for it, memory is never idle between the two.
//
// Where `rows` is no multiple of 64, the last group of an operand reaches into what follows in shared memory; the rows
// of the product that come of it are not stored. What a box has outside W or x arrives as zeros.
//
// An instruction waits for the one before if it adds to the same sums, about as long as four of them take. So where a
// piece has fewer than four groups of 64 rows, a result has SPLITS sums, which take turns in K, 16 elements each, and
// are added at the end. The order is that of K and of these: the bits of an output depend on SPLITS, which the launcher
// chooses by the number of rows of W alone, and neither on COLUMNS and GROUPS nor on rows, panels and stages.
//
// GATED: W has rows of gates and then as many of ups, and y = act(gate) * up with the roundings of
// activation.py: a piece is `rows` rows of each, in separate groups, so that one thread has a gate and its up.
//
// archs: sm_90a
// variants: DTYPE=BF16,F16 COLUMNS=8,16,32,64 GROUPS=1 SPLITS=4
// variants: DTYPE=BF16,F16 COLUMNS=8,16,32,64 GROUPS=2 SPLITS=2
// variants: DTYPE=BF16,F16 COLUMNS=8,16,32,64 GROUPS=4 SPLITS=1
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
constexpr int products = 4;     // instructions for a group and a panel, 32 bytes of a row each
// Whether products of one panel are under way while those of the next are started. Not with few large stages, which are
// better given back at once.
constexpr bool overlapping = GROUPS < 4;
constexpr int multiplying_warps = 4;
constexpr int threads = (multiplying_warps + 1) * warp_size;

// The shape of the product and how it is cut up. n: columns of y. rows: of each part of W in a piece, a multiple of 8.
struct Shape {
    int m, n, k_panels, rows, panels, stages;

    __device__ __forceinline__ int pieces_of_block() const {
        const int pieces = (n + rows - 1) / rows;
        return (pieces - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
    }
    __device__ __forceinline__ int steps_of_piece() const { return (k_panels + panels - 1) / panels; }
    // From one piece of the block to the next.
    __device__ __forceinline__ int piece_distance() const { return gridDim.x * rows; }
    __device__ __forceinline__ u32 part_bytes() const { return panels * rows * row_bytes; }
    __device__ __forceinline__ u32 stage_bytes() const { return parts * part_bytes() + panels * COLUMNS * row_bytes; }
};

// Stages in shared memory, each with its panels of the parts of W, one part after the other, and then of x; and two
// barriers for each: for the arrival of the data and for the end of their use.
struct Ring {
    u32 data, barriers;

    // The barriers lie at the end, behind what the last operand may reach into.
    __device__ __forceinline__ explicit Ring(u32 shared_bytes, const Shape& shape)
        : data(shared_address(dynamic_shared())), barriers(data + shared_bytes - 16 * shape.stages) {}
    __device__ __forceinline__ u32 full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ u32 empty(int stage) const { return barriers + 16 * stage + 8; }
    __device__ __forceinline__ u32 weight(int stage, const Shape& shape) const {
        return data + stage * shape.stage_bytes();
    }
    __device__ __forceinline__ u32 x(int stage, const Shape& shape) const {
        return weight(stage, shape) + parts * shape.part_bytes();
    }
};

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
    __device__ __forceinline__ void prefetch(Place at) const {
#pragma unroll
        for (int part = 0; part < parts; part++) tensor_prefetch(weight_map, 0, at.row + part * shape.n, at.panel);
    }
};

// Fills the ring with weights, and L2 with those of `prefetched` more steps: what may happen before the kernel before
// has ended. Returns where to go on after the ring.
__device__ __forceinline__ Place begin_copies(const Copies& copies, int steps, int prefetched) {
    const int stages = copies.shape.stages;
    Place at{static_cast<int>(blockIdx.x) * copies.shape.rows};
#pragma unroll 1
    for (int step = 0; step < min(stages, steps); step++, at.advance(copies.shape)) copies.weight(at, step);
    Place ahead = at;
#pragma unroll 1
    for (int step = stages; step < min(stages + prefetched, steps); step++, ahead.advance(copies.shape))
        copies.prefetch(ahead);
    return at;
}

__device__ __forceinline__ void go_on_copying(const Copies& copies, int steps, Place at) {
    const int stages = copies.shape.stages;
    async_global_fence();
    Place first{0};
#pragma unroll 1
    for (int step = 0; step < min(stages, steps); step++, first.advance(copies.shape)) copies.x(first, step);
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

// ---- products, by the warpgroup

// As descriptor_at, in 32 bits: the address is in the low half, and no sum of addresses leaves it.
__device__ __forceinline__ u64 operand_at(u64 descriptor, u32 bytes) {
    return (descriptor & ~0xffffffffull) | (static_cast<u32>(descriptor) + (bytes >> 4));
}

struct Sums {
    float of[GROUPS][SPLITS][COLUMNS / 2];

    __device__ __forceinline__ void keep() {
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
            for (int split = 0; split < SPLITS; split++) keep_registers(of[group][split]);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
            for (int split = 0; split < SPLITS; split++)
#pragma unroll
                for (int i = 0; i < COLUMNS / 2; i++) of[group][split][i] = 0;
    }
    // Starts to add the products of a panel.
    __device__ __forceinline__ void add(u64 weight, u64 x, const Shape& shape) {
        keep();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < products; i++)
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const u32 distance = group % parts * shape.part_bytes() + group / parts * group_rows * row_bytes;
                const u32 step = i * row_bytes / products;
                wgmma_shared<scalar_t, COLUMNS, false>(of[group][i % SPLITS], operand_at(weight, distance + step),
                                                       operand_at(x, step), true);
            }
        wgmma_commit();
    }
    __device__ __forceinline__ float total(int group, int i) const {
        float sums[SPLITS];
#pragma unroll
        for (int split = 0; split < SPLITS; split++) sums[split] = of[group][split][i];
#pragma unroll
        for (int n = 1; n < SPLITS; n *= 2)
#pragma unroll
            for (int split = 0; split < SPLITS; split += 2 * n) sums[split] += sums[split + n];
        return sums[0];
    }
};

// This thread has two rows of each group, and of them an even and an odd column of each 8.
__device__ __forceinline__ int row_of_thread(int group, int half) {
    return group / parts * group_rows + half * 8 + warp_id() * 16 + lane_id() / 4;
}
__device__ __forceinline__ int column_of_thread(int i) { return i / 2 * 8 + lane_id() % 4 * 2 + i % 2; }
__device__ __forceinline__ constexpr int place_in_sums(int half, int column) {
    return column / 2 * 4 + half * 2 + column % 2;
}

// The bias of this thread's rows of a piece. Loaded ahead of the products where there are registers for it.
struct Bias {
    static constexpr bool early = COLUMNS < 64;
    float of[GROUPS][2] = {};

    __device__ __forceinline__ void load(const scalar_t* bias, int first_row, const Shape& shape) {
        if (bias == nullptr) return;
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = first_row + row_of_thread(group, half);
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

// The value of y in row `row` of the piece, from the sums of its group (and, GATED, the next one).
template <Activation kind>
__device__ __forceinline__ float result(const Sums& sums, const Bias& bias, const Output& out, int group, int half,
                                        int column) {
    const int i = place_in_sums(half, column);
    const float sum = sums.total(group, i) + bias.of[group][half];
    if constexpr (parts == 1) return sum;
    const float gate = rounded<scalar_t>(sum);
    const float up = rounded<scalar_t>(sums.total(group + parts - 1, i) + bias.of[group + parts - 1][half]);
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
        for (int group = 0; group < GROUPS; group += parts)
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

// Barriers' arrivals: one copying thread, and a lane of each multiplying warp.
__device__ __forceinline__ void init_barriers(const Ring& ring, int stages) {
#pragma unroll 1
    for (int stage = 0; stage < stages; stage++) {
        barrier_init(ring.full(stage), 1);
        barrier_init(ring.empty(stage), multiplying_warps);
    }
    barrier_init_fence();
}

// weight_map: of W [parts * n, k] seen as [k / 64, parts * n, 64], boxes of [panels, rows, 64]; x_map: of x [m, k] in the
// same way, boxes of [panels, COLUMNS, 64]; bias [parts * n] or null; y: m rows of n elements, y_stride apart, float if
// `float_out`. k_panels: k / 64. activation (SILU or GELU_TANH) and limit: of GATED. prefetched: how many steps behind
// those of the ring are brought into L2 meanwhile. shared_bytes: the size of the dynamic shared memory. Two blocks fit
// into a multiprocessor, so that the next product's can be there.
extern "C" __global__ void __launch_bounds__(threads, 2)
stream_gemm(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
            const scalar_t* bias, void* y, int m, int n, int k_panels, i64 y_stride, int float_out, int rows, int panels,
            int stages, int shared_bytes, int prefetched, int activation, float limit) {
    pdl_launch_dependents();
    const Shape shape{m, n, k_panels, rows, panels, stages};
    const Ring ring(shared_bytes, shape);
    const int pieces = shape.pieces_of_block(), steps_of_piece = shape.steps_of_piece();
    if (warp_id() == multiplying_warps) {
        const Copies copies{weight_map, x_map, shape, ring};
        Place at{0};
        if (lane_id() == 0) {
            tensor_map_prefetch(weight_map);
            init_barriers(ring, stages);
            at = begin_copies(copies, pieces * steps_of_piece, prefetched);
            tensor_map_prefetch(x_map);
        }
        __syncthreads();
        pdl_wait();
        if (lane_id() == 0) go_on_copying(copies, pieces * steps_of_piece, at);
        return;
    }

    __syncthreads();
    const Output out{y, y_stride, float_out, activation, limit};
    Sums sums;
    int stage = 0, before = 0;
    u32 parity = 0;
    for (int piece = 0, first_row = blockIdx.x * rows; piece < pieces; piece++, first_row += shape.piece_distance()) {
        Bias bias_of_rows;
        if (Bias::early) bias_of_rows.load(bias, first_row, shape);
        if (piece == 0) pdl_wait();
        sums.clear();
#pragma unroll 1
        for (int step = 0; step < steps_of_piece; step++) {
            u64 weight = matrix_descriptor(ring.weight(stage, shape), 16, 8 * row_bytes);
            u64 x_panel = matrix_descriptor(ring.x(stage, shape), 16, 8 * row_bytes);
            barrier_wait(ring.full(stage), parity);
#pragma unroll 1
            for (int panel = 0; panel < panels; panel++) {
                sums.add(weight, x_panel, shape);
                wgmma_wait<overlapping ? 1 : 0>();
                // The products of the stage before have ended now.
                if (overlapping && panel == 0 && step > 0 && lane_id() == 0) barrier_arrive(ring.empty(before));
                weight = operand_at(weight, rows * row_bytes);
                x_panel = operand_at(x_panel, COLUMNS * row_bytes);
            }
            if (!overlapping && lane_id() == 0) barrier_arrive(ring.empty(stage));
            before = stage;
            if (++stage == stages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        if (overlapping && lane_id() == 0) barrier_arrive(ring.empty(before));
        sums.keep();
        if (!Bias::early) bias_of_rows.load(bias, first_row, shape);
        store(sums, bias_of_rows, out, first_row, shape);
    }
}
