// The tensor cores' product of 16-bit floats, by one warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nla {

// out [4] += a lane's part of A B: columns 2 sub, 2 sub + 1 of rows g and g + 8. g: the lane's quad in the warp; sub:
// the lane in the quad.
[[maybe_unused]] __device__ __forceinline__ void multiply(float* out, const uint4& a, uint32_t b0, uint32_t b1,
                                                          __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
[[maybe_unused]] __device__ __forceinline__ void multiply(float* out, const uint4& a, uint32_t b0, uint32_t b1,
                                                          __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

}  // namespace nla
