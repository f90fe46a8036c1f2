// What a block of every product is made of: its sizes, where its threads stand, and their sums.

constexpr int OUTS = 64 * TILES * ABREAST, PARTS = ABREAST == 1 ? 2 : 1;
constexpr int GRID = GROUPS * (1 + ZEROS);        // 16-bit floats of an output in a chunk
constexpr int X_BYTES = ROWS * CHUNK * 2, WORD_BYTES = OUTS * 64, GRID_BYTES = OUTS * GRID * 2;
constexpr int WEIGHT_BYTES = WORD_BYTES + GRID_BYTES;
constexpr int CONSUMERS = 4 * PARTS * ABREAST;    // warps that multiply

__device__ __forceinline__ u32 address_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Where a thread stands: `row` is its first output, `lane` its place in the four that share it, `part` its turn.
struct Place {
    int lane, part, row;
    u32 swizzled;  // a row of activations and a piece of it, for load_tiles

    __device__ __forceinline__ Place() {
        const int thread = threadIdx.x, warp = thread / 32;
        lane = thread % 4, part = warp / 4 % PARTS, row = (warp / 4 - part) * 64 * TILES + warp % 4 * 16 + thread % 32 / 4;
        swizzled = thread % 8 * 128 + (thread / 8 % 4 ^ thread % 8) * 16;
    }
};

using Sums = float[TILES * ROWS / 2];

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int j = 0; j < TILES * ROWS / 2; ++j) sums[j] = 0;
}
