// How sums become rows of y on Hopper: through shared memory, where the 64 outputs of a warpgroup lie by rows.

constexpr u32 HELD_BYTES = 1024;  // of eight rows

// Two tiles of 8 outputs times 8 rows, 16 bits each, turned into rows of 16 bytes, which lie where the threads say, eight each.
__device__ __forceinline__ void store_tiles(u32 address, u32 left, u32 right) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(left), "r"(right) : "memory");
}

// The four warps of this warpgroup.
__device__ __forceinline__ void warpgroup_barrier() {
    __syncwarp();
    asm volatile("bar.sync %0, 128;" ::"r"(2 + threadIdx.x / 128) : "memory");
}

// Puts a warpgroup's sums of eight rows at `held`, a multiple of 1,024, 128 bytes a row whose 16-byte pieces are swizzled.
__device__ __forceinline__ void hold(const float* sums, u32 held) {
    const int thread = threadIdx.x % 128, turn = thread % 8;
    store_tiles(held + turn * 128 + (thread / 32 * 2 + thread / 8 % 2 ^ turn) * 16, rounded(sums[0], sums[1]), rounded(sums[2], sums[3]));
}

// By thread / 8 of eight such rows: writes 128 bytes of row `row` of y, of which eight threads have a piece each.
__device__ __forceinline__ void write_row(u32 held, int row, int out0, u16* y, int m, int n) {
    const int piece = threadIdx.x % 8, turn = threadIdx.x / 8 % 8, out = out0 + piece * 8;
    u32 v[4];
    load(v, held + turn * 128 + (piece ^ turn) * 16);
    if (row < m && out < n) *(uint4*)(y + (long long)row * n + out) = make_uint4(v[0], v[1], v[2], v[3]);
}

// The same for all of a warpgroup's sums of 64 outputs.
__device__ __forceinline__ void hold_all(const Sums& sums, u32 held) {
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) hold(sums + j * 4, held + j * HELD_BYTES);
}

// Writes them.
__device__ __forceinline__ void write_out(const Sums& sums, u32 held, int row0, int out0, u16* y, int m, int n) {
    hold_all(sums, held);
    warpgroup_barrier();
#pragma unroll 4
    for (int row = threadIdx.x % 128 / 8; row < ROWS; row += 16) write_row(held + row / 8 * HELD_BYTES, row0 + row, out0, y, m, n);
}
