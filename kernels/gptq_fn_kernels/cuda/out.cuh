// How sums become rows of y on Hopper: through shared memory, where the 64 outputs of a warpgroup lie by rows.

// Two tiles of 8 outputs times 8 rows, 16 bits each, turned into rows of 16 bytes, which lie where the threads say, eight each.
__device__ __forceinline__ void store_tiles(u32 address, u32 left, u32 right) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(left), "r"(right) : "memory");
}

// The four warps of this warpgroup.
__device__ __forceinline__ void warpgroup_barrier() {
    __syncwarp();
    asm volatile("bar.sync %0, 128;" ::"r"(2 + threadIdx.x / 128) : "memory");
}

// Writes a warpgroup's sums of 64 outputs, 128 bytes of a row at a time. They take so many bytes for each row from `held` on, a
// multiple of 1,024, whose 16-byte pieces are swizzled over 8 rows.
__device__ __forceinline__ void write_out(const float (&sums)[ROWS / 2], u32 held, int row0, int out0, u16* y, int m, int n) {
    const int thread = threadIdx.x % 128, turn = thread % 8;
    const u32 to = held + turn * 128 + (thread / 32 * 2 + thread / 8 % 2 ^ turn) * 16;
#pragma unroll
    for (int j = 0; j < ROWS / 2; j += 4) store_tiles(to + j * 256, rounded(sums[j], sums[j + 1]), rounded(sums[j + 2], sums[j + 3]));
    warpgroup_barrier();
    const int out = out0 + thread % 8 * 8;
#pragma unroll 4
    for (int row = thread / 8; row < ROWS; row += 16) {
        u32 v[4];
        load(v, held + row * 128 + (thread % 8 ^ row % 8) * 16);
        if (row0 + row < m && out < n) *(uint4*)(y + (long long)(row0 + row) * n + out) = make_uint4(v[0], v[1], v[2], v[3]);
    }
}
