// What blocks of a cluster read of each other.

// Of all threads, which then see what the others did before, in all blocks.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A number of shared memory as block `rank` of the cluster has it.
__device__ __forceinline__ float remote(const float *p, int rank) {
    unsigned int here = (unsigned int)__cvta_generic_to_shared(p), there;
    float v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
    return v;
}
