// What the Hopper kernels share: rings of chunks that TMA fills.
//
// Compiled with -D: BITS 4 or 8, GROUP inputs to a scale (16 to a chunk), ROWS 8 to 256 of a block, TILES 1 of 64 outputs
// for a warpgroup, ABREAST 1 to 3 warpgroups side by side, STAGES of a ring, BLOCKS to a multiprocessor, FEWEST rows
// for which a warp's matrix instruction is the faster one, SENT rows up to which blocks send each other their sums, BRAIN 1 for
// activations of bfloat16, SCALES 1 for scales of bfloat16, ZEROS 1 where there are zero points.

#include "bits.cuh"
#include "start.cuh"
#include "block.cuh"

constexpr int BOXES = CHUNK / 64;                 // 128 bytes of a row of x: what the swizzle spans
constexpr bool LARGE = ROWS >= (ABREAST == 3 ? 128 : 192);  // sums take so many registers that the warps that copy give of theirs
constexpr int WEIGHTS = CONSUMERS, INPUTS = WEIGHTS + 1;  // the warps that bring them: those of lower numbers multiply
constexpr int THREADS = 32 * CONSUMERS + (LARGE ? 128 : 64);
static_assert(STAGES % PARTS == 0, "a stage always belongs to the same warpgroup");
static_assert(STAGES > PARTS, "a chunk is released when its warpgroup has the next");

struct alignas(64) TensorMap { unsigned long long opaque[16]; };

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\nover:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
                 "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int input, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(input), "r"(row), "r"(barrier)
                 : "memory");
}

// Whether this is the thread of its warp that does what one does for all, by all of them: what a whole warp goes through takes less than
// a loop of one thread.
__device__ __forceinline__ bool elected() {
    u32 one;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one));
    return one;
}

// Has a map at hand that copies are about to ask for.
__device__ __forceinline__ void prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Of a tensor, what of a box lies within it. Belongs to the thread's next group of copies.
__device__ __forceinline__ void store_box(const TensorMap* map, u32 from, int output, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(output), "r"(row), "r"(from)
                 : "memory");
}

// The ring of a block: activations and weights of STAGES chunks, with a barrier for having come and one for having been read.
struct Ring {
    u32 inputs, weights, full, empty;

    __device__ __forceinline__ u32 inputs_of(int i) const { return inputs + i % STAGES * X_BYTES; }
    __device__ __forceinline__ u32 weights_of(int i) const { return weights + i % STAGES * WEIGHT_BYTES; }
    __device__ __forceinline__ u32 full_of(int i) const { return full + i % STAGES * 8; }
    __device__ __forceinline__ u32 empty_of(int i) const { return empty + i % STAGES * 8; }

    // By all threads of the block, before anything else.
    __device__ __forceinline__ Ring(void* dynamic, unsigned long long* barriers) {
        inputs = (address_of(dynamic) + 1023) & ~1023u, weights = inputs + STAGES * X_BYTES;
        full = address_of(barriers), empty = full + STAGES * 8;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; ++i) {
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full_of(i)));
                asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty_of(i)), "n"(CONSUMERS / PARTS));
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
    }

    // Chunk `chunk` of the weights of outputs from out0 on, as the i-th that comes through the ring.
    __device__ __forceinline__ void bring_weights(int i, const u32* words, const u16* grid, int chunk, int out0, int n) const {
        const u32 outs = min(OUTS, n - out0);
        const long long at = (long long)chunk * n + out0;
        wait_empty(i);
        if (!elected()) return;
        expect(full_of(i), X_BYTES + outs * (64 + GRID * 2));
        copy(weights_of(i), words + at * 16, outs * 64, full_of(i));
        copy(weights_of(i) + WORD_BYTES, grid + at * GRID, outs * GRID * 2, full_of(i));
    }

    // The same chunk of rows from row0 on, by whoever comes first: its barrier counts bytes that are not yet expected, too.
    __device__ __forceinline__ void bring_inputs(int i, const TensorMap* x, int chunk, int row0) const {
        wait_empty(i);
        if (!elected()) return;
        for (int box = 0; box < BOXES; ++box) copy_box(inputs_of(i) + box * ROWS * 128, x, chunk * CHUNK + box * 64, row0, full_of(i));
    }

    __device__ __forceinline__ void wait_full(int i) const { wait(full_of(i), i / STAGES & 1); }

    // Until what was there before the i-th has been read.
    __device__ __forceinline__ void wait_empty(int i) const {
        if (i >= STAGES) wait(empty_of(i), (i / STAGES + 1) & 1);
    }

    // Leaves the i-th place without a chunk, to whoever multiplies.
    __device__ __forceinline__ void lend(int i) const {
        wait_empty(i);
        if (elected()) arrive(full_of(i));
    }

    // By every warp that has used all that it loaded from it: an arrival does not wait for loads.
    __device__ __forceinline__ void release(int i) const {
        if (threadIdx.x % 32 == 0) arrive(empty_of(i));
    }

    // By one thread for the four warps of its warpgroup.
    __device__ __forceinline__ void release_four(int i) const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 4;" ::"r"(empty_of(i)) : "memory");
    }
};

// The number of a thread's warp. Shuffled, for the compiler to see that no warp parts where it decides: else it takes what a warp's
// threads have in common, such as where the matrix units read, to differ, and moves it to where it must not for every instruction.
__device__ __forceinline__ int warp_of() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// A block of LARGE starts with as many registers for each warpgroup, of which all but the one that copies want more.
__device__ __forceinline__ void give_registers() {
    if (LARGE) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(ABREAST == 3 ? 56 : 40));
}

__device__ __forceinline__ void take_registers() {
    if (LARGE) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ABREAST == 3 ? 152 : 232));
}

// All warps that multiply, of one block.
__device__ __forceinline__ void consumers_barrier() {
    __syncwarp();
    asm volatile("bar.sync 1, %0;" ::"n"(32 * CONSUMERS) : "memory");
}
