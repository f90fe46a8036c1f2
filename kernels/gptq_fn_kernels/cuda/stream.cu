// y = x W^T on Hopper for many rows: as many blocks as multiprocessors share all chunks, as stream.cuh tells.

#include "hopper.cuh"
#include "by_warpgroup.cuh"
#include "stream.cuh"
#include "out.cuh"

static_assert(PARTS == 1, "all warps take the same chunks");

constexpr int LENT = (OUTS / 64 + BOXES - 1) / BOXES;  // places in the ring that a tile of y takes on its way out
static_assert(LENT < STAGES, "the next tile's chunks come meanwhile");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    stream(const __grid_constant__ TensorMap x, const u32* __restrict__ words, const u16* __restrict__ grid, u16* __restrict__ y, float4* left,
           int* flags, int m, int n, int chunks) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long barriers[2 * STAGES];
    const Ring ring(dynamic, barriers);
    let_others_start();
    const long long units = (long long)((m + ROWS - 1) / ROWS) * ((n + OUTS - 1) / OUTS) * chunks;
    const auto bound = [&](int block) { return (int)(units * block / (int)gridDim.x); };
    const int block = blockIdx.x, begin = bound(block), end = bound(block + 1);

    if (threadIdx.x >= 32 * CONSUMERS) {
        give_registers();
        if (threadIdx.x == 32 * CONSUMERS) {
            // Weights do not come from the kernel before this one, so the first ones need not wait for it.
            int early = 0;
            for (int stop = end, i = 0; stop > begin;) {
                const int tile = (stop - 1) / chunks, start = max(begin, tile * chunks);
                const Tile at = tile_of(tile, m, n);
                if (stop == end) {
                    early = min(STAGES, stop - start);
                    for (int j = 0; j < early; ++j) ring.bring_weights(j, words, grid, start - tile * chunks + j, at.out0, n);
                    wait_for_others();
                }
                for (int unit = start; unit < stop; ++unit, ++i) {
                    if (i >= early) {
                        ring.wait_empty(i);
                        ring.bring_weights(i, words, grid, unit - tile * chunks, at.out0, n);
                    }
                    ring.bring_inputs(i, &x, unit - tile * chunks, at.row0);
                }
                if (stop == (tile + 1) * chunks)
                    for (const int from = i; i < from + LENT; ++i) ring.lend(i);
                stop = start;
            }
        }
    } else {
        take_registers();
        const Place place;
        const Magic magic = magic_of();
        const int group = threadIdx.x / 128;  // warpgroups go on alone, each with flags of its own
        Sums sums;
        for (int stop = end, i = 0; stop > begin;) {
            const int tile = (stop - 1) / chunks, start = max(begin, tile * chunks);
            clear(sums);
            for (int unit = start; unit < stop; ++unit, ++i) add_chunk(sums, ring, i, unit == start ? -1 : i - 1, place, magic);
            finish();
            ring.release(i - 1);
            if (stop < (tile + 1) * chunks) {
                leave(sums, left, block);
                warpgroup_barrier();
                if (threadIdx.x % 128 == 0) raise(flags + block * ABREAST + group);
            } else {
                for (int other = block, from = start; from > tile * chunks;) {
                    from = bound(--other);
                    if (threadIdx.x % 128 == 0) wait_raised(flags + other * ABREAST + group);
                    warpgroup_barrier();
                    add_left(sums, left, other);
                }
                const Tile at = tile_of(tile, m, n);
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    const int part = group * TILES + t, lent = i + part / BOXES;
                    ring.wait_full(lent);
                    write_out(sums[t], ring.inputs_of(lent) + part % BOXES * ROWS * 128, at.row0, at.out0 + part * 64, y, m, n);
                }
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // TMA writes there next
                __syncwarp();
                for (const int from = i; i < from + LENT; ++i) {
                    ring.wait_full(i);  // else a warp that is ahead would release what others still read in this place
                    ring.release(i);
                }
            }
            stop = start;
        }
    }
}
