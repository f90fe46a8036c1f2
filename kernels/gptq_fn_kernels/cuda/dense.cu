// The weight [n, width] itself, in the activations' type: what cuBLAS is given where rows are many.
//
// Compiled with -D: BITS, GROUP, BRAIN, SCALES, ZEROS as in hopper.cuh.

#include "bits.cuh"
#include "start.cuh"

constexpr int OUTS = 16, SPAN = 4;  // outputs and chunks of a block: it writes rows of 512 or 1,024 bytes
constexpr int THREADS = OUTS * SPAN * 4;
constexpr int GRID = GROUPS * (1 + ZEROS);
constexpr int PITCH = SPAN * CHUNK / 2 + 4;  // in words of two weights; 16 bytes more: fewer conflicts

// Four threads dequantize a chunk of an output in shared memory; the block then writes it out in rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    dense(const u32* __restrict__ words, const u16* __restrict__ grid, u32* __restrict__ weight, int n, int chunks) {
    __shared__ alignas(16) u32 tile[OUTS * PITCH];
    __shared__ u16 grids[SPAN * OUTS * GRID];
    const int first = blockIdx.x * SPAN, out0 = blockIdx.y * OUTS, outs = min(OUTS, n - out0), span = min(SPAN, chunks - first);
    const int lane = threadIdx.x % 4, out = threadIdx.x / 4 % OUTS, part = threadIdx.x / (4 * OUTS);
    const bool live = out < outs && part < span;
    uint4 held = {};
    if (live) held = __ldcs((const uint4*)words + ((long long)(first + part) * n + out0 + out) * 4 + lane);
    for (int i = threadIdx.x; i < SPAN * OUTS * GRID; i += THREADS) {
        const int chunk = i / (OUTS * GRID), within = i % (OUTS * GRID);
        if (chunk < span && within < outs * GRID) grids[i] = grid[((long long)(first + chunk) * n + out0) * GRID + within];
    }
    __syncthreads();
    if (live) {
        const u32 w[4] = {held.x, held.y, held.z, held.w};
        const u32 at = (u32)__cvta_generic_to_shared(grids) + (part * OUTS + out) * GRID * 2;
        const Magic magic = magic_of();
        Scale s;
#pragma unroll
        for (int step = 0; step < 2 * FIELDS; ++step) {
            if (step * 16 % GROUP == 0) s = scale_of(at + step * 16 / GROUP * (1 + ZEROS) * 2, UNIT);
#pragma unroll
            for (int eight = 0; eight < 2; ++eight)
                tile[out * PITCH + part * (CHUNK / 2) + step * 8 + eight * 4 + lane] =
                    weights_of(w[step / FIELDS * 2 + eight], step % FIELDS, s, magic);
        }
    }
    __syncthreads();
    wait_for_others();  // one of which may still read what was in the weight's place
    constexpr int PIECES = CHUNK / 8;  // of 16 bytes in a chunk of a row
    for (int i = threadIdx.x; i < OUTS * SPAN * PIECES; i += THREADS) {
        const int o = i / (SPAN * PIECES), piece = i % (SPAN * PIECES);
        if (o < outs && piece < span * PIECES)
            ((uint4*)weight)[((long long)(out0 + o) * chunks + first) * PIECES + piece] = *(const uint4*)&tile[o * PITCH + piece * 4];
    }
}
