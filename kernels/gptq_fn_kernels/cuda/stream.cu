// y = x W^T on Hopper for many rows: as many blocks as multiprocessors, each of which makes tiles of y one after the other.
//
// Where tiles are not as many for all, those of the last rounds are shared evenly, as stream.cuh tells. A tile that is done leaves
// shared memory by TMA while its block multiplies the next one's first chunk.

#include "hopper.cuh"
#include "by_warpgroup.cuh"
#include "stream.cuh"
#include "out.cuh"

static_assert(PARTS == 1, "all warps take the same chunks");

constexpr int LENT = (OUTS / 64 + BOXES - 1) / BOXES;  // places in the ring that a tile of y takes on its way out
static_assert(LENT < STAGES, "the next tile's chunks come meanwhile");

// Where 64 outputs of a tile are that leaves through the places of the ring from `from` on.
__device__ __forceinline__ u32 held_of(const Ring& ring, int from, int part) {
    return ring.inputs_of(from + part / BOXES) + part % BOXES * ROWS * 128;
}

// Tiles of y on their way out, which TMA reads from shared memory while their warpgroup multiplies again.
struct Leaving {
    int place = -1;  // in the ring, of the first of what it still reads

    // By a warpgroup that holds sums of the outputs from out0 on in the places from `from` on.
    __device__ __forceinline__ void send(const Ring& ring, int from, const TensorMap* y, int row0, int out0, int n) {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        warpgroup_barrier();
        if (threadIdx.x % 128 == 0) {
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const int part = threadIdx.x / 128 * TILES + t, out = out0 + part * 64;
                if (out < n) store_box(y, held_of(ring, from, part), out, row0);
            }
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
        __syncwarp();
        place = from;
    }

    // Until all have been read.
    __device__ __forceinline__ void wait() const {
        if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        __syncwarp();
    }

    // Gives their places back to the ring, for all warps of the warpgroup.
    __device__ __forceinline__ void release(const Ring& ring) {
        if (place < 0) return;
        wait();
        if (threadIdx.x % 128 == 0)
            for (int i = 0; i < LENT; ++i) ring.release_four(place + i);
        place = -1;
    }
};

// Chunks from `first` to `last` of a tile.
struct Part {
    int tile, first, last;
};

// What a block makes, in turns: its share of the chunks of the first `shared` tiles, from behind, then as many of the others as the
// rest of the blocks, side by side, so that all go through the same inputs at a time, which come from L2 then. Nothing of it changes
// from turn to turn: of what did, the compiler would not see that all threads have the same.
struct Work {
    int begin, end;  // of the share
    int shares, turns;

    __device__ __forceinline__ Work(int tiles, int shared, int chunks) {
        const int block = blockIdx.x, blocks = gridDim.x;
        begin = bound(block, shared, chunks), end = bound(block + 1, shared, chunks);
        shares = end > begin ? (end - 1) / chunks - begin / chunks + 1 : 0;
        turns = shares + (tiles - shared - block + blocks - 1) / blocks;
    }

    // Where the share of a block begins.
    static __device__ __forceinline__ int bound(int block, int shared, int chunks) {
        const int blocks = gridDim.x, all = shared * chunks;
        return all / blocks * block + min(block, all % blocks);
    }

    __device__ __forceinline__ Part part_of(int turn, int shared, int chunks) const {
        if (turn >= shares) return {shared + (int)blockIdx.x + (turn - shares) * (int)gridDim.x, 0, chunks};
        const int tile = (end - 1) / chunks - turn;
        return {tile, max(begin - tile * chunks, 0), min(end - tile * chunks, chunks)};
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    stream(const __grid_constant__ TensorMap x, const u32* __restrict__ words, const u16* __restrict__ grid, const __grid_constant__ TensorMap y,
           float4* left, int* flags, int m, int n, int chunks, int shared) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long barriers[2 * STAGES];
    const Ring ring(dynamic, barriers);
    let_others_start();
    const Work work((m + ROWS - 1) / ROWS * ((n + OUTS - 1) / OUTS), shared, chunks);

    if (copies()) {
        give_registers();
        if (threadIdx.x == 32 * CONSUMERS) {
            int early = 0;
            for (int turn = 0, i = 0; turn < work.turns; ++turn) {
                const Part part = work.part_of(turn, shared, chunks);
                const Tile at = tile_of(part.tile, m, n);
                if (turn == 0) {
                    // Weights do not come from the kernel before this one, so the first ones need not wait for it.
                    early = min(STAGES, part.last - part.first);
                    for (int j = 0; j < early; ++j) ring.bring_weights(j, words, grid, part.first + j, at.out0, n);
                    wait_for_others();
                }
                for (int chunk = part.first; chunk < part.last; ++chunk, ++i) {
                    if (i >= early) {
                        ring.wait_empty(i);
                        ring.bring_weights(i, words, grid, chunk, at.out0, n);
                    }
                    ring.bring_inputs(i, &x, chunk, at.row0);
                }
                if (part.last == chunks)
                    for (const int from = i; i < from + LENT; ++i) ring.lend(i);
            }
        }
    } else {
        take_registers();
        const Place place;
        const Magic magic = magic_of();
        const int group = threadIdx.x / 128;  // warpgroups go on alone, each with flags of its own
        Sums sums;
        Leaving leaving;
        for (int turn = 0, i = 0; turn < work.turns; ++turn) {
            const Part part = work.part_of(turn, shared, chunks);
            clear(sums);
            for (int chunk = part.first; chunk < part.last; ++chunk, ++i) {
                add_chunk(sums, ring, i, chunk == part.first ? -1 : i - 1, place, magic);
                leaving.release(ring);
            }
            finish();
            ring.release(i - 1);
            if (part.last < chunks) {
                leave(sums, left, blockIdx.x);
                warpgroup_barrier();
                if (threadIdx.x % 128 == 0) raise(flags + blockIdx.x * ABREAST + group);
            } else {
                for (int block = blockIdx.x, from = part.first; from > 0;) {
                    from = Work::bound(--block, shared, chunks) - part.tile * chunks;
                    if (threadIdx.x % 128 == 0) wait_raised(flags + block * ABREAST + group);
                    warpgroup_barrier();
                    add_left(sums, left, block);
                }
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    const int outs = group * TILES + t;
                    ring.wait_full(i + outs / BOXES);
                    hold_all(sums[t], held_of(ring, i, outs));
                }
                const Tile at = tile_of(part.tile, m, n);
                leaving.send(ring, i, &y, at.row0, at.out0, n);
                i += LENT;
            }
        }
        leaving.wait();
    }
}
