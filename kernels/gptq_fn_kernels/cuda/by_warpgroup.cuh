// The product with a chunk by a warpgroup's matrix instruction: while one half of a chunk is multiplied, the next is dequantized.

#include "wgmma.cuh"

// Adds the product with the i-th chunk of the ring, when it has come. The matrix units are still reading it then, but have read
// chunk `before`, which is released unless it is negative.
__device__ __forceinline__ void add_chunk(Sums& sums, const Ring& ring, int i, int before, const Place& place, const Magic& magic) {
    const u32 inputs = ring.inputs_of(i), weights = ring.weights_of(i);
    ring.wait_full(i);
    const unsigned long long rows = descriptor_of(inputs);
    u32 upper[4], lower[4];
    load(upper, weights + place.row * 64 + place.lane * 16);
    load(lower, weights + (place.row + 8) * 64 + place.lane * 16);
    const u32 grids = weights + WORD_BYTES + place.row * GRID * 2;
    Scale s, r;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 a[FIELDS][4];
#pragma unroll
        for (int field = 0; field < FIELDS; ++field) {
            const int input = (half * FIELDS + field) * 16;
            if (input % GROUP == 0) {
                s = scale_of(grids + input / GROUP * 2 * (1 + ZEROS));
                r = scale_of(grids + 8 * GRID * 2 + input / GROUP * 2 * (1 + ZEROS));
            }
            a[field][0] = weights_of(upper[half * 2], field, s, magic);
            a[field][1] = weights_of(lower[half * 2], field, r, magic);
            a[field][2] = weights_of(upper[half * 2 + 1], field, s, magic);
            a[field][3] = weights_of(lower[half * 2 + 1], field, r, magic);
        }
#pragma unroll
        for (int field = 0; field < FIELDS; ++field) settle(a[field]);
        wgmma_fence();
#pragma unroll
        for (int field = 0; field < FIELDS; ++field) {
            const int input = (half * FIELDS + field) * 16;
            wgmma<ROWS>(sums, a[field], rows + (input / 64 * ROWS * 128 + input % 64 * 2) / 16);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (half == 0 && before >= 0) ring.release(before);
    }
}

// Until all of a thread's chunks have been read.
__device__ __forceinline__ void finish() { wgmma_wait<0>(); }
