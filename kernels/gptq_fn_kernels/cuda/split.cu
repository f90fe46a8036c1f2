// y = x W^T on Hopper for few rows: the blocks of a cluster share the inputs among themselves.
//
// A block makes ROWS rows times OUTS outputs of y over its part of the inputs. One warp brings weights through a ring, one
// inputs; warpgroups hold 64 outputs each and multiply: two or three ABREAST take the same chunks, one takes every other.
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

    if (const int warp = warp_of(); warp >= CONSUMERS) {
        give_registers();
        if (warp == WEIGHTS)
            for (int i = 0; i < count; ++i) ring.bring_weights(i, words, grid, first + i, out0, n);
        if (warp == INPUTS) {
            prefetch(&x);
            wait_for_others();
            for (int i = 0; i < count; ++i) ring.bring_inputs(i, &x, first + i, row0);
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
        const int group = threadIdx.x / 128;
        write_out(sums, ring.inputs + group * ROWS * 128, row0, out0 + group * 64, y, m, n);
    }
}
