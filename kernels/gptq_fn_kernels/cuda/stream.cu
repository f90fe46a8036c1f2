// y = x W^T on Hopper for many rows: as many blocks as multiprocessors, each of which makes tiles of y one after the other.
//
// Where tiles are not as many for all, those of the last rounds are shared evenly, as stream.cuh tells. A tile that is done leaves
// shared memory by TMA while its block multiplies the next one's first chunk.

#include "hopper.cuh"
#include "by_warpgroup.cuh"
#include "stream.cuh"
#include "out.cuh"

static_assert(PARTS == 1, "all warps take the same chunks");

constexpr int LENT = (ABREAST + BOXES - 1) / BOXES;  // places in the ring that a tile of y takes on its way out
static_assert(LENT < STAGES, "the next tile's chunks come meanwhile");

// Where the outputs of a warpgroup are of a tile that leaves through the places of the ring from `from` on.
__device__ __forceinline__ u32 held_of(const Ring& ring, int from, int group) {
    return ring.inputs_of(from + group / BOXES) + group % BOXES * ROWS * 128;
}

// Tiles of y on their way out, which TMA reads from shared memory while their warpgroup multiplies again.
struct Leaving {
    int place = -1;  // in the ring, of the first of what it still reads

    // By a warpgroup that holds sums of outputs of a tile, which begins at out0, in the places from `from` on.
    __device__ __forceinline__ void send(const Ring& ring, int from, const TensorMap* y, int row0, int out0, int n) {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        warpgroup_barrier();
        if (threadIdx.x % 128 == 0) {
            const int group = threadIdx.x / 128, out = out0 + group * 64;
            if (out < n) store_box(y, held_of(ring, from, group), out, row0);
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
    u32 begin = 0, end = 0;      // of the share
    u32 last = 0, shares = 0;    // the tile in which it ends, and of how many it has chunks
    u32 tiles, shared, chunks;

    __device__ __forceinline__ Work(u32 tiles, u32 shared, u32 chunks) : tiles(tiles), shared(shared), chunks(chunks) {
        if (shared == 0) return;
        begin = bound(blockIdx.x), end = bound(blockIdx.x + 1), last = (end - 1) / chunks, shares = last - begin / chunks + 1;
    }

    // Where the share of a block begins.
    __device__ __forceinline__ u32 bound(u32 block) const {
        const u32 all = shared * chunks;
        return all / gridDim.x * block + min(block, all % gridDim.x);
    }

    // Of a tile that there is not, when there are no more.
    __device__ __forceinline__ Part part_of(u32 turn) const {
        if (turn >= shares) return {int(shared + blockIdx.x + (turn - shares) * gridDim.x), 0, int(chunks)};
        const int tile = last - turn, before = tile * chunks;
        return {tile, max(int(begin) - before, 0), min(int(end) - before, int(chunks))};
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

    if (const int warp = warp_of(); warp >= CONSUMERS) {
        give_registers();
        if (warp == WEIGHTS)
            for (int turn = 0, i = 0;; ++turn) {
                const Part part = work.part_of(turn);
                if (part.tile >= work.tiles) break;
                const Tile at = tile_of(part.tile, m, n);
                for (int chunk = part.first; chunk < part.last; ++chunk, ++i) ring.bring_weights(i, words, grid, chunk, at.out0, n);
                if (part.last == chunks)
                    for (const int from = i; i < from + LENT; ++i) ring.lend(i);
            }
        if (warp == INPUTS) {
            prefetch(&x);
            wait_for_others();
            for (int turn = 0, i = 0;; ++turn) {
                const Part part = work.part_of(turn);
                if (part.tile >= work.tiles) break;
                const Tile at = tile_of(part.tile, m, n);
                for (int chunk = part.first; chunk < part.last; ++chunk, ++i) ring.bring_inputs(i, &x, chunk, at.row0);
                if (turn == 0) prefetch(&y);
                if (part.last == chunks) i += LENT;
            }
        }
    } else {
        take_registers();
        const Place place;
        const Magic magic = magic_of();
        const int group = threadIdx.x / 128;  // warpgroups go on alone, each with flags of its own
        Sums sums;
        Leaving leaving;
        for (int turn = 0, i = 0;; ++turn) {
            const Part part = work.part_of(turn);
            if (part.tile >= work.tiles) break;
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
                    from = work.bound(--block) - part.tile * chunks;
                    if (threadIdx.x % 128 == 0) wait_raised(flags + block * ABREAST + group);
                    warpgroup_barrier();
                    add_left(sums, left, block);
                }
                ring.wait_full(i + group / BOXES);
                hold_all(sums, held_of(ring, i, group));
                const Tile at = tile_of(part.tile, m, n);
                leaving.send(ring, i, &y, at.row0, at.out0, n);
                i += LENT;
            }
        }
        leaving.wait();
    }
}
