// How the sums of a tile of many rows are added up that several warpgroups have parts of: those that take turns, of all blocks of
// a cluster. Each leaves its sums where the ring was, and fetches others' of the rows that it writes.

#include "cluster.cuh"
#include "out.cuh"

constexpr int PITCH = OUTS + 4;  // floats; 4 more than a multiple of 32 banks: no conflicts

// Four floats of the shared memory of another block.
__device__ __forceinline__ float4 fetch(u32 far) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(far) : "memory");
    return v;
}

__device__ __forceinline__ void expect_sums(u32, int, int) {}

__device__ __forceinline__ void begin_sums() {}

// By threads that only copy, at their end.
__device__ __forceinline__ void leave_sums() {
    publish_in_cluster();
    wait_for_cluster();
    arrive_in_cluster();
    wait_for_cluster();
}

// Leaves sums, adds up in order those of the rows that are this block's, and writes them.
__device__ __forceinline__ void add_up(Sums& sums, const Ring& ring, u32, const Place& place, int row0, int out0, u16* y, int m, int n) {
    const Member me;
    consumers_barrier();  // the ring is free: the sums take its place
#pragma unroll
    for (int j = 0; j < ROWS / 2; ++j) {
        const int column = j / 4 * 8 + place.lane * 2 + j % 2, out = place.row + j / 2 % 2 * 8;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(ring.inputs + ((place.part * ROWS + column) * PITCH + out) * 4), "f"(sums[j])
                     : "memory");
    }
    publish_in_cluster();
    wait_for_cluster();
    const int live = min(ROWS, m - row0);
    for (int i = me.rank * 32 * CONSUMERS + threadIdx.x; i < live * (OUTS / 4); i += me.blocks * 32 * CONSUMERS) {
        const int row = i / (OUTS / 4), out = i % (OUTS / 4) * 4;
        if (out0 + out >= n) continue;
        float4 total = {};
#pragma unroll
        for (u32 block = 0; block < 8; ++block)
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                if (block < me.blocks) {
                    const float4 v = fetch(there(ring.inputs + ((part * ROWS + row) * PITCH + out) * 4, block));
                    total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
                }
        const uint2 packed = {rounded(total.x, total.y), rounded(total.z, total.w)};
        *(uint2*)(y + (long long)(row0 + row) * n + out0 + out) = packed;
    }
    arrive_in_cluster();  // nobody leaves whose memory is read
    wait_for_cluster();
}
