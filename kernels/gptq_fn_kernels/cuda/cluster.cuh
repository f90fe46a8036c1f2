// The blocks of a cluster, which see each other's shared memory.

// The address in block `block` of what lies at `address` here.
__device__ __forceinline__ u32 there(u32 address, u32 block) {
    u32 far;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(far) : "r"(address), "r"(block));
    return far;
}

// Arrival of every thread of the cluster, or none: says nothing of what was written before.
__device__ __forceinline__ void arrive_in_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// The same after which others see what was written.
__device__ __forceinline__ void publish_in_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Until all have arrived.
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Which block of a cluster of how many this is. Read where it is needed rather than kept in registers.
struct Member {
    u32 rank, blocks;

    __device__ __forceinline__ Member() {
        asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
        asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    }

    // Warpgroups that have a part of the sums.
    __device__ __forceinline__ int holders() const { return blocks * PARTS; }
};
