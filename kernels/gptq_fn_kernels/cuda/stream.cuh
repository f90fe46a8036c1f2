// What the kernels have in common whose blocks share chunks of tiles of y evenly (stream-K).
//
// A block takes a range of them and goes through it from behind, tile by tile. Where its range ends within a tile, that comes
// first, and it leaves its sums to the next block, whose last tile it is: whoever has a tile's last chunk adds up what the
// blocks before it have left, in order, and writes the tile. So a block waits only for blocks before it, which wait for
// nothing before they leave their sums: it ends however few blocks run at a time.

constexpr u32 PANEL = 2048 / ROWS;  // blocks of rows that go through the weight together, while their activations stay in L2

struct Tile {
    int row0, out0;
};

__device__ __forceinline__ Tile tile_of(int tile, int m, int n) {
    const u32 high = (m + ROWS - 1) / ROWS, wide = (n + OUTS - 1) / OUTS;
    const u32 panel = high > PANEL ? tile / (PANEL * wide) : 0, within = tile - panel * PANEL * wide, rows = min(PANEL, high - panel * PANEL);
    return {int((panel * PANEL + within % rows) * ROWS), int(within / rows * OUTS)};
}

// 8 times 8 floats of 16 bits, of which each thread has two neighbours in a row: the same of the transposed.
__device__ __forceinline__ u32 transposed(u32 pair) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
    return d;
}

__device__ __forceinline__ void store(const Sums& sums, const Place& place, const Tile& tile, u16* y, int m, int n) {
    const int turned = threadIdx.x % 32 / 4;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int j = 0; j < ROWS / 2; j += 2) {
            const u32 pair = transposed(rounded(sums[t * ROWS / 2 + j], sums[t * ROWS / 2 + j + 1]));
            const int row = tile.row0 + j / 4 * 8 + turned, out = tile.out0 + place.row - turned + 64 * t + j / 2 % 2 * 8 + place.lane * 2;
            if (row < m && out < n) *(u32*)(y + (long long)row * n + out) = pair;
        }
}

// Each thread leaves its sums as they are, so whoever has the same place finds them.
__device__ __forceinline__ void leave(const Sums& sums, float4* left, int block) {
    float4* to = left + (long long)block * (ROWS * OUTS / 4) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < TILES * ROWS / 2; j += 4)
        to[j / 4 * 32 * CONSUMERS] = make_float4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]);
}

__device__ __forceinline__ void add_left(Sums& sums, const float4* left, int block) {
    const float4* kept = left + (long long)block * (ROWS * OUTS / 4) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < TILES * ROWS / 2; j += 4) {
        const float4 v = __ldcg(kept + j / 4 * 32 * CONSUMERS);
        sums[j] += v.x, sums[j + 1] += v.y, sums[j + 2] += v.z, sums[j + 3] += v.w;
    }
}

// By one thread behind a barrier of all that have left theirs.
__device__ __forceinline__ void raise(int* flag) { asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory"); }

// Waits for it by one thread, and leaves it as the next kernel wants to find it.
__device__ __forceinline__ void wait_raised(int* flag) {
    int there;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
    while (!there);
    *flag = 0;
}
