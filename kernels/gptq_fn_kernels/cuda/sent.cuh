// How the sums of a tile of few rows are added up that several warpgroups have parts of: those that take turns, of all blocks of
// a cluster. Each sends its sums to whose they are, and waits for nobody whom it has nothing from.
//
// Eight rows of a warpgroup's 64 outputs are a share, four floats of each thread. Every block adds up the shares that are its own,
// which come into its shared memory; a barrier counts their bytes (st.async).

#include "cluster.cuh"
#include "out.cuh"

constexpr int SHARES = ROWS / 8, SHARE_THREADS = 128 * ABREAST, SHARE_BYTES = 16 * SHARE_THREADS;
constexpr bool APART = ROWS <= FEWEST;  // shares have a place beside the ring, else where it was

// Four floats to another block, whose barrier counts them when they are there.
__device__ __forceinline__ void send(u32 far, u32 far_barrier, const float* v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(far), "f"(v[0]),
                 "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(far_barrier)
                 : "memory");
}

// Of the four threads that share an output of a share, those whose rows there are.
__device__ __forceinline__ int live_lanes(int share, int row0, int m) {
    return max(0, min(4, (m - row0 - share * 8 + 1) / 2));
}

// Whose a share is: the l-th of block `owner`, where it is added up by the warpgroups in turn.
struct Turn {
    u32 owner;
    int l;

    __device__ __forceinline__ bool is(u32 rank, const Place& place) const { return owner == rank && l % PARTS == place.part; }

    __device__ __forceinline__ void pass(int own) {
        if (++l == own) l = 0, ++owner;
    }
};

// Shares of a block; those of the last ones may be fewer.
__device__ __forceinline__ int shares_of(const Member& me) { return (SHARES + me.blocks - 1) / me.blocks; }

// By all threads, before the ring is made, which makes the barrier known.
__device__ __forceinline__ void expect_sums(u32 barrier, int row0, int m) {
    if (threadIdx.x > 0) return;
    const Member me;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
    u32 lanes = 0;
    for (int own = shares_of(me), share = me.rank * own, l = 0; l < own && share < SHARES; ++l, ++share) lanes += live_lanes(share, row0, m);
    expect(barrier, (me.holders() - 1) * lanes * (SHARE_BYTES / 4));
}

// By all threads, when the ring is made.
__device__ __forceinline__ void begin_sums() {
    if (APART) arrive_in_cluster();
}

// By threads that only copy, at their end.
__device__ __forceinline__ void leave_sums() {
    if (!APART) arrive_in_cluster();
}

// Sends sums to whose they are, adds up in order what comes, and writes it.
__device__ __forceinline__ void add_up(Sums& sums, const Ring& ring, u32 barrier, const Place& place, int row0, int out0, u16* y, int m, int n) {
    const Member me;
    const int holders = me.holders(), own = shares_of(me), holder = me.rank * PARTS + place.part;
    const int thread = threadIdx.x % SHARE_THREADS, group = thread / 128;
    const u32 received = ring.inputs + (APART ? STAGES * (X_BYTES + WEIGHT_BYTES) + 1023 & ~1023 : 0);
    const auto slot = [&](int from, int l) { return received + (from * own + l) * SHARE_BYTES; };
    const u32 held = slot(holder, 0) + group * 2048;  // where nobody sends anything for this warpgroup's own shares

    if (!APART) arrive_in_cluster();
    wait_for_cluster();
    Turn turn = {};
#pragma unroll
    for (int share = 0; share < SHARES; ++share, turn.pass(own))
        if (!turn.is(me.rank, place) && place.lane < live_lanes(share, row0, m))
            send(there(slot(holder, turn.l) + thread * 16, turn.owner), there(barrier, turn.owner), sums + share * 4);
    const int first = me.rank * own, count = min(own, SHARES - first);
    if (count <= 0) return;
    wait(barrier, 0);
    turn = {};
#pragma unroll
    for (int share = 0; share < SHARES; ++share, turn.pass(own)) {
        if (!turn.is(me.rank, place)) continue;
        float* total = sums + share * 4;
#pragma unroll 4
        for (int other = 0; other < holders - 1; ++other) {
            float v[4];
            load(v, slot(other + (other >= holder), turn.l) + thread * 16);
#pragma unroll
            for (int j = 0; j < 4; ++j) total[j] += v[j];
        }
        hold(total, held + turn.l * SHARE_BYTES);
    }
    warpgroup_barrier();
#pragma unroll 1
    for (int l = place.part + threadIdx.x % 128 / 64 * PARTS; l < count; l += 2 * PARTS) {
        const int row = row0 + (first + l) * 8 + threadIdx.x / 8 % 8;
        write_row(held + l * SHARE_BYTES, row, out0 + group * 64, y, m, n);
    }
}
