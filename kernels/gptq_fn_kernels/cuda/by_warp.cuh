// The product with a chunk by a warp's matrix instruction, which up to FEWEST rows is faster than a warpgroup's. It sums levels,
// exact in 16 bits, and a group's scale multiplies the sum.

#include "mma.cuh"

// Adds the product with the i-th chunk of the ring, when it has come, and releases chunk `before` unless it is negative. That one has been
// read: its products wanted all that was loaded from it. Of the i-th, loads are under way behind which the compiler would release it at once,
// while TMA, which does not wait for them, brings the next.
__device__ __forceinline__ void add_chunk(Sums& sums, const Ring& ring, int i, int before, const Place& place, const Magic& magic) {
    const u32 inputs = ring.inputs_of(i), weights = ring.weights_of(i);
    ring.wait_full(i);
    __syncwarp();
    if (before >= 0) ring.release(before);
    u32 upper[4], lower[4], b[ROWS / 8][4];
    load(upper, weights + place.row * 64 + place.lane * 16);
    load(lower, weights + (place.row + 8) * 64 + place.lane * 16);
    const u32 grids = weights + WORD_BYTES + place.row * GRID * 2;
    Scale s, r;
    float group[ROWS / 2];
#pragma unroll
    for (int step = 0; step < 2 * FIELDS; ++step) {
        const int input = step * 16, half = step / FIELDS, field = step % FIELDS;
        if (input % GROUP == 0) {
            s = scale_of(grids + input / GROUP * 2 * (1 + ZEROS));
            r = scale_of(grids + 8 * GRID * 2 + input / GROUP * 2 * (1 + ZEROS));
#pragma unroll
            for (int j = 0; j < ROWS / 2; ++j) group[j] = 0;
        }
        const u32 a[4] = {levels_of(upper[half * 2], field, s, magic), levels_of(lower[half * 2], field, r, magic),
                          levels_of(upper[half * 2 + 1], field, s, magic), levels_of(lower[half * 2 + 1], field, r, magic)};
#pragma unroll
        for (int j = 0; j < ROWS / 8; ++j) {
            if (step % 2 == 0) load_tiles(b[j], inputs + input / 64 * ROWS * 128 + j * 1024 + (place.swizzled ^ input % 64 * 2));
            mma(&group[j * 4], a, b[j] + step % 2 * 2);
        }
        if ((input + 16) % GROUP == 0)
#pragma unroll
            for (int j = 0; j < ROWS / 2; ++j) sums[j] += group[j] * (j % 4 < 2 ? s : r).full;
    }
}

__device__ __forceinline__ void finish() {}
