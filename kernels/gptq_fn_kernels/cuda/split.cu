// y = x W^T on Hopper for few rows: the blocks of a cluster share the inputs among themselves.
//
// A block makes ROWS rows times OUTS outputs of y over its part of the inputs. One warp brings chunks of inputs through a
// ring; warpgroups hold 64 * TILES outputs each and multiply: two or three ABREAST take the same chunks, one takes every other.
// The parts are added up in order, through the shared memory of the cluster; a block that has all of them writes at once.

#include "hopper.cuh"
#if ROWS <= FEWEST
#include "by_warp.cuh"
#else
#include "by_warpgroup.cuh"
#endif
#if ROWS <= SENT
#include "sent.cuh"
#else
#include "fetched.cuh"  // sending them takes longer by as much as they are more
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    split(const __grid_constant__ TensorMap x, const u32* __restrict__ words, const u16* __restrict__ grid, u16* __restrict__ y, int m, int n,
          int chunks) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long barriers[2 * STAGES + 1];
    const int row0 = blockIdx.x * ROWS, out0 = blockIdx.y * OUTS;
    const u32 landed = address_of(barriers + 2 * STAGES);
    expect_sums(landed, row0, m);
    const Ring ring(dynamic, barriers);
    let_others_start();
    begin_sums();
    const Member me;
    const bool alone = me.holders() == 1;
    const int first = chunks * me.rank / me.blocks, count = chunks * (me.rank + 1) / me.blocks - first;

    if (copies()) {
        give_registers();
        if (threadIdx.x == 32 * CONSUMERS) {
            // Weights do not come from the kernel before this one, so they need not wait for it.
            const int early = min(STAGES, count);
            for (int i = 0; i < early; ++i) ring.bring_weights(i, words, grid, first + i, out0, n);
            wait_for_others();
            for (int i = 0; i < early; ++i) ring.bring_inputs(i, &x, first + i, row0);
            for (int i = early; i < count; ++i) {
                ring.wait_empty(i);
                ring.bring_weights(i, words, grid, first + i, out0, n);
                ring.bring_inputs(i, &x, first + i, row0);
            }
        }
        if (!alone) leave_sums();
    } else {
        take_registers();
        const Place place;
        const Magic magic = magic_of();
        Sums sums;
        clear(sums);
        for (int i = place.part; i < count; i += PARTS) add_chunk(sums, ring, i, i - PARTS, place, magic);
        finish();
        if (!alone) {
            add_up(sums, ring, landed, place, row0, out0, y, m, n);
            return;
        }
        consumers_barrier();  // the ring is free: y goes out through it
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            const int part = threadIdx.x / 128 * TILES + t;
            write_out(sums[t], ring.inputs + part * ROWS * 128, row0, out0 + part * 64, y, m, n);
        }
    }
}
