// y = x W^T on Hopper for few rows: the blocks of a cluster share the inputs among themselves.
//
// A block makes ROWS rows times OUTS outputs of y over its part of the inputs. One warp brings chunks of inputs through a
// ring; warpgroups hold 64 * TILES outputs each and multiply: two or three ABREAST take the same chunks, one takes every other.
// While the matrix units work on one half of a chunk, the next half is dequantized. The parts are added up, in order,
// through the shared memory of the cluster; a block that has all of them writes at once.

#include "hopper.cuh"
#include "out.cuh"

constexpr int PITCH = OUTS + 4;  // floats; 4 more than a multiple of 32 banks: no conflicts

// Shared memory written before it can be read after it by every block of the cluster.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same without waiting for what was written.
__device__ __forceinline__ void cluster_end() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Four floats of the shared memory of another block of the cluster, where this block has `address`.
__device__ __forceinline__ float4 there(u32 address, u32 block) {
    float4 v;
    asm volatile(
        "{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at];\n}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(address), "r"(block)
        : "memory");
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    split(const __grid_constant__ TensorMap x, const u32* __restrict__ words, const u16* __restrict__ grid, u16* __restrict__ y, int m, int n,
          int chunks) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long barriers[2 * STAGES];
    const Ring ring(dynamic, barriers);
    let_others_start();
    u32 rank, blocks;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    const int first = chunks * rank / blocks, count = chunks * (rank + 1) / blocks - first;
    const int row0 = blockIdx.x * ROWS, out0 = blockIdx.y * OUTS;

    if (threadIdx.x >= 32 * CONSUMERS) {
        give_registers();
        if (threadIdx.x == 32 * CONSUMERS) {
            // Weights do not come from the kernel before this one, so they need not wait for it.
            const int early = min(STAGES, count);
            for (int i = 0; i < early; ++i) ring.bring_weights(i, words, grid, first + i, out0, n);
            wait_for_others();
            for (int i = 0; i < early; ++i) ring.bring_inputs(i, &x, first + i, row0);
            for (int i = early; i < count; ++i) {
                ring.wait_empty(i);
                ring.bring_weights(i, words, grid, first + i, out0, n);
                ring.bring_inputs(i, &x, first + i, row0);
            }
        }
        __syncwarp();
        if (blocks * PARTS == 1) return;
        cluster_barrier();
        cluster_end();
    } else {
        take_registers();
        const Place place;
        const Magic magic = magic_of();
        Sums sums;
        clear(sums);
        for (int i = place.part; i < count; i += PARTS) add_chunk(sums, ring, i, i - PARTS, place, magic);
        if (!FEW) wgmma_wait<0>();
        consumers_barrier();  // the ring is free: the sums take its place
        if (blocks * PARTS == 1) {  // nobody has others of them
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const int part = threadIdx.x / 128 * TILES + t;
                write_out(sums[t], ring.inputs + part * ROWS * 128, row0, out0 + part * 64, y, m, n);
            }
            return;
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int j = 0; j < ROWS / 2; ++j) {
                const int column = j / 4 * 8 + place.lane * 2 + j % 2, out = place.row + 64 * t + j / 2 % 2 * 8;
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(ring.inputs + ((place.part * ROWS + column) * PITCH + out) * 4), "f"(sums[t][j])
                             : "memory");
            }
        __syncwarp();
        cluster_barrier();
        const int live = min(ROWS, m - row0);
        for (int i = rank * 32 * CONSUMERS + threadIdx.x; i < live * (OUTS / 4); i += blocks * 32 * CONSUMERS) {
            const int row = i / (OUTS / 4), out = i % (OUTS / 4) * 4;
            if (out0 + out >= n) continue;
            float4 total = {};
#pragma unroll
            for (u32 block = 0; block < 8; ++block)
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    if (block < blocks) {
                        const float4 v = there(ring.inputs + ((part * ROWS + row) * PITCH + out) * 4, block);
                        total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
                    }
            const uint2 packed = {rounded(total.x, total.y), rounded(total.z, total.w)};
            *(uint2*)(y + (long long)(row0 + row) * n + out0 + out) = packed;
        }
        __syncwarp();
        cluster_end();  // nobody leaves whose memory is read
    }
}
