// The weight [n, width] itself, in the activations' type: what cuBLAS is given where rows are many.
//
// Compiled with -D: BITS, GROUP, BRAIN, SCALES, ZEROS as in hopper.cu.

#include "bits.cuh"

constexpr int OUTS = 64, THREADS = 256;
constexpr int GRID = GROUPS * (1 + ZEROS);
constexpr int PITCH = CHUNK / 2 + 4;  // in words of two weights; 16 bytes more: fewer conflicts

// A block dequantizes a chunk of inputs of 64 outputs in shared memory, and writes it out in rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    dense(const u32* __restrict__ words, const u16* __restrict__ grid, u32* __restrict__ weight, int n, int chunks) {
    __shared__ alignas(16) u32 tile[OUTS * PITCH];
    __shared__ u16 grids[OUTS * GRID];
    const int chunk = blockIdx.x, out0 = blockIdx.y * OUTS, outs = min(OUTS, n - out0);
    const long long at = (long long)chunk * n + out0;
    for (int i = threadIdx.x; i < outs * GRID; i += THREADS) grids[i] = grid[at * GRID + i];
    __syncthreads();
    const int out = threadIdx.x / 4, lane = threadIdx.x % 4;
    if (out < outs) {
        const uint4 held = ((const uint4*)words)[at * 4 + threadIdx.x];
        const u32 w[4] = {held.x, held.y, held.z, held.w};
        const Magic magic = magic_of();
        Scale s;
#pragma unroll
        for (int step = 0; step < 2 * FIELDS; ++step) {
            if (step * 16 % GROUP == 0) s = scale_of((u32)__cvta_generic_to_shared(grids) + (out * GRID + step * 16 / GROUP * (1 + ZEROS)) * 2);
#pragma unroll
            for (int eight = 0; eight < 2; ++eight)
                tile[out * PITCH + step * 8 + eight * 4 + lane] = weights_of(w[step / FIELDS * 2 + eight], step % FIELDS, s, magic);
        }
    }
    __syncthreads();
    constexpr int PIECES = CHUNK / 8;  // of 16 bytes in a row
    for (int i = threadIdx.x; i < outs * PIECES; i += THREADS) {
        const int o = i / PIECES, piece = i % PIECES;
        ((uint4*)weight)[(out0 + o) * (long long)chunks * PIECES + chunk * PIECES + piece] = *(const uint4*)&tile[o * PITCH + piece * 4];
    }
}
