// A warp's row in shared memory, as the fast encoder reads it: chunks of eight channels (rows.cuh), a lane's own.
// Knows nothing of codes.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "rows.cuh"

namespace nla {

constexpr int kQuads = 8;  // of a warp

// Eight neighbouring channels as they lie in memory: float32 32 bytes, the halves 16.
template <typename T>
struct Chunk {
    uint4 part[sizeof(T) / 2];
};

__device__ __forceinline__ float2 two_floats(uint32_t word, __nv_bfloat16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 two_floats(uint32_t word, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

template <typename T>
__device__ __forceinline__ void unpack(const Chunk<T>& chunk, float* out) {
    const uint32_t* words = &chunk.part[0].x;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) out[i] = __uint_as_float(words[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kChunk / 2; ++i) {
            const float2 two = two_floats(words[i], T{});
            out[2 * i] = two.x;
            out[2 * i + 1] = two.y;
        }
    }
}

// Eight channels as bfloat16 bits.
__device__ __forceinline__ uint4 bf16_chunk(const float (&v)[kChunk]) {
    uint32_t word[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i)
        word[i] = bf16_bits(__float_as_uint(v[2 * i])) | bf16_bits(__float_as_uint(v[2 * i + 1])) << 16;
    return {word[0], word[1], word[2], word[3]};
}

// A warp's row: for each pass of the warp over eight blocks, each lane's chunks.
template <typename T, Layout layout>
class StagedRow {
  public:
    static constexpr int kParts = sizeof(T) / 2;  // 16-byte pieces of a chunk

    static constexpr __host__ __device__ int passes(int quads) { return (quads + kQuads - 1) / kQuads; }
    static constexpr __host__ __device__ int pieces(int quads) { return passes(quads) * 4 * kParts * 32; }

    __device__ StagedRow(uint4* memory, int quads, int lane)
        : mine_(memory + lane), quads_(quads), sub_(lane & 3), quad_(lane / 4) {}

    __device__ int passes() const { return passes(quads_); }
    __device__ bool works(int pass) const { return quad(pass) < quads_; }
    __device__ int quad(int pass) const { return pass * kQuads + quad_; }

    // Start copying a pass of a row from global memory. What was there must have been read by this lane.
    __device__ void copy(const T* row, int pass) const {
        if (!works(pass)) return;
        const uint4* from = reinterpret_cast<const uint4*>(row + (quad(pass) * kBlock + chunk_of<layout>(sub_, 0) * kChunk));
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                __pipeline_memcpy_async(piece(pass, c, part), from + (c * kChunkStep<layout> * kParts + part), 16);
        }
    }

    __device__ void wait() const {
        __pipeline_commit();
        __pipeline_wait_prior(0);
    }

    // What no copy has reached is undefined.
    __device__ Chunk<T> chunk(int pass, int c) const {
        Chunk<T> chunk;
#pragma unroll
        for (int part = 0; part < kParts; ++part) chunk.part[part] = *piece(pass, c, part);
        return chunk;
    }

  private:
    __device__ uint4* piece(int pass, int c, int part) const { return mine_ + ((pass * 4 + c) * kParts + part) * 32; }

    uint4* mine_;
    int quads_, sub_, quad_;
};

template <typename Row>
__device__ __forceinline__ double sum_of_squares(const Row& row) {
    double sums[4] = {};  // so that one need not wait for another
#pragma unroll 2
    for (int pass = 0; pass < row.passes(); ++pass) {
        if (!row.works(pass)) continue;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float v[kChunk];
            unpack(row.chunk(pass, c), v);
#pragma unroll
            for (int e = 0; e < kChunk; ++e)
                sums[c] = __fma_rn(static_cast<double>(v[e]), static_cast<double>(v[e]), sums[c]);
        }
    }
    double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
    return sum;
}

template <typename Row>
__device__ __forceinline__ void store_bits(const Row& row, uint16_t* to, int pass, int at, int step) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        float v[kChunk];
        unpack(row.chunk(pass, c), v);
        *reinterpret_cast<uint4*>(to + (at + c * step * kChunk)) = bf16_chunk(v);
    }
}

}  // namespace nla
