// y = x W^T with a warp's matrix instruction, on every GPU from sm_80 on.
//
// A block makes ROWS rows times OUTS outputs of y at a time, a warp 16 * TILES outputs of it. All threads copy chunks of inputs
// into a ring of STAGES (cp.async), so that while one is multiplied the next ones are on their way. The blocks share all chunks
// of all tiles as stream.cuh tells.
//
// Compiled with -D: BITS 4 or 8, GROUP inputs to a scale (16 to a chunk), ROWS 8 to 64, TILES 1 or 2, ABREAST 2, STAGES 2 or
// more, BLOCKS to a multiprocessor, BRAIN 1 for activations of bfloat16, SCALES 1 for scales of bfloat16, ZEROS 1 where there
// are zero points.

#include "bits.cuh"
#include "mma.cuh"
#include "start.cuh"
#include "block.cuh"
#include "stream.cuh"

static_assert(PARTS == 1, "all warps take the same chunks");

constexpr int THREADS = 32 * CONSUMERS, STAGE_BYTES = X_BYTES + WEIGHT_BYTES;
constexpr int PIECES = CHUNK / 8;                     // of 16 bytes in a row of activations
constexpr int AT_ONCE = ROWS * TILES <= 16 ? 4 : 1;   // blocks whose sums are read at a time

// 16 bytes to shared memory, or zeros in their place.
__device__ __forceinline__ void copy(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Ends a group of copies, which may be empty.
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `groups` of this thread's are under way.
template <int groups>
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory"); }

// One unit after the other, from behind.
struct Cursor {
    int tile, chunk;
    Tile at;

    __device__ __forceinline__ Cursor(int unit, int chunks, int m, int n)
        : tile(unit / chunks), chunk(unit % chunks), at(tile_of(tile, m, n)) {}

    __device__ __forceinline__ void next(int chunks, int m, int n) {
        if (chunk-- == 0) --tile, chunk = chunks - 1, at = tile_of(tile, m, n);
    }
};

// Adds the product with the chunk at `inputs`, behind which its weights are.
__device__ __forceinline__ void add_chunk(Sums& sums, u32 inputs, const Place& place, const Magic& magic) {
    const u32 weights = inputs + X_BYTES;
    u32 words[TILES][2][4];  // of an output and of the one 8 behind it
    Scale scales[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) load(words[t][lower], weights + (place.row + 64 * t + 8 * lower) * 64 + place.lane * 16);
#pragma unroll
    for (int step = 0; step < 2 * FIELDS; step += 2) {
        u32 a[TILES][2][4];
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd)
#pragma unroll
                for (int lower = 0; lower < 2; ++lower) {
                    const int input = (step + odd) * 16, half = (step + odd) / FIELDS, field = (step + odd) % FIELDS;
                    if (input % GROUP == 0) {
                        const int group = (place.row + 64 * t + 8 * lower) * GROUPS + input / GROUP;
                        scales[t][lower] = scale_of(weights + WORD_BYTES + group * (2 + 2 * ZEROS));
                    }
#pragma unroll
                    for (int eight = 0; eight < 2; ++eight)
                        a[t][odd][2 * eight + lower] = weights_of(words[t][lower][2 * half + eight], field, scales[t][lower], magic);
                }
#pragma unroll
        for (int j = 0; j < ROWS / 8; ++j) {
            u32 b[4];
            load_tiles(b, inputs + step / 4 * ROWS * 128 + j * 1024 + (place.swizzled ^ step % 4 * 32));
#pragma unroll
            for (int odd = 0; odd < 2; ++odd)
#pragma unroll
                for (int t = 0; t < TILES; ++t) mma(sums + t * ROWS / 2 + j * 4, a[t][odd], b + 2 * odd);
        }
        __syncwarp();  // else the compiler loads all activations of a chunk first, more than there are registers
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    multistage(const u16* __restrict__ x, const u32* __restrict__ words, const u16* __restrict__ grid, u16* __restrict__ y, float4* left,
               int* flags, int m, int n, int chunks, int k, int stride) {
    extern __shared__ uint4 dynamic[];
    const u32 ring = address_of(dynamic);
    let_others_start();
    wait_for_others();
    const int units = (m + ROWS - 1) / ROWS * ((n + OUTS - 1) / OUTS) * chunks, share = units / (int)gridDim.x, more = units % (int)gridDim.x;
    // The first `more` blocks have a unit more than the others.
    const auto bound = [&](int block) { return block * share + min(block, more); };
    const auto owner = [&](int unit) {
        const int behind = unit - more * (share + 1);
        return behind < 0 ? unit / (share + 1) : more + behind / share;
    };
    const int block = blockIdx.x, begin = bound(block), count = bound(block + 1) - begin;

    Cursor coming(begin + count - 1, chunks, m, n), here = coming;
    const auto bring = [&](int i) {
        const u32 inputs = ring + i % STAGES * STAGE_BYTES, weights = inputs + X_BYTES;
#pragma unroll
        for (int start = 0; start < ROWS * PIECES; start += THREADS) {
            const int row = (start + threadIdx.x) / PIECES, piece = threadIdx.x % PIECES, input = coming.chunk * CHUNK + piece * 8;
            const bool there = coming.at.row0 + row < m && input < k;
            const u16* from = there ? x + (long long)(coming.at.row0 + row) * stride + input : x;
            if (row < ROWS) copy(inputs + (piece / 8 * ROWS + row) * 128 + (piece % 8 ^ row % 8) * 16, from, there);
        }
        const int outs = min(OUTS, n - coming.at.out0);
        const long long first = (long long)coming.chunk * n + coming.at.out0;
#pragma unroll
        for (int start = 0; start < OUTS * 4; start += THREADS) {
            const int at = start + threadIdx.x;
            if (at < outs * 4) copy(weights + at * 16, words + first * 16 + at * 4, true);
        }
#pragma unroll
        for (int start = 0; start < OUTS * GRID / 8; start += THREADS) {
            const int at = start + threadIdx.x;
            if (at < outs * GRID / 8) copy(weights + WORD_BYTES + at * 16, grid + first * GRID + at * 8, true);
        }
        coming.next(chunks, m, n);
    };

    const Place place;
    const Magic magic = magic_of();
    Sums sums;
    clear(sums);
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < count) bring(i);
        copies_end();
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        wait_copies<STAGES - 2>();
        __syncthreads();  // the i-th has come for all, and nobody reads the one before it any more
        if (i + STAGES - 1 < count) bring(i + STAGES - 1);
        copies_end();
        add_chunk(sums, ring + i % STAGES * STAGE_BYTES, place, magic);
        if (here.chunk == 0 || i == count - 1) {
            if (begin + count < (here.tile + 1) * chunks) {
                leave(sums, left, block);
                __threadfence();
                __syncthreads();
                if (threadIdx.x == 0) raise(flags + block);
            } else {
                // The tile's last chunk was this block's. All before it are waited for at once, for on small layers they are many.
                const int first = here.chunk == 0 ? block : owner(here.tile * chunks);
                for (int other = first + threadIdx.x; other < block; other += THREADS) wait_raised(flags + other);
                __syncthreads();
#pragma unroll AT_ONCE
                for (int other = block - 1; other >= first; --other) add_left(sums, left, other);
                store(sums, place, here.at, y, m, n);
            }
            clear(sums);
        }
        here.next(chunks, m, n);
    }
}
