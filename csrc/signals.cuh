// Words in memory by which threads of different GPUs, and the host, tell one another something.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nla {

// Sets a word of any GPU. Who sees the value by `received` sees what this thread wrote before, or knew to be written.
__device__ __forceinline__ void send(uint32_t* word, uint32_t value) {
    asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t received(const uint32_t* word) {
    uint32_t value;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

// A word that the host may have set, and which says nothing of other memory.
__device__ __forceinline__ uint32_t seen(const uint32_t* word) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

}  // namespace nla
