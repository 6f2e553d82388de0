// A warp's row in shared memory, as the fast encoder reads it: chunks of eight channels (rows.cuh). Each chunk belongs
// to one lane, except where two rows share a pass.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "rows.cuh"

namespace nla {

constexpr int kQuads = 8;  // per warp

// Eight neighbouring channels as they are in memory: 32 bytes of float32, 16 of the 16-bit floats.
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

// A warp's row: for each pass of the warp over eight blocks, each lane's chunks. If the last pass has work for at most
// half of the warp, its other half has room for the same blocks of another row. `half` says which half is meant.
template <typename T, Layout layout>
class StagedRow {
  public:
    static constexpr int kParts = sizeof(T) / 2;  // 16-byte pieces of a chunk
    static constexpr int kPass = kQuads * kBlock;  // channels
    static constexpr bool kSwaps = layout == Layout::Packed;  // whether lanes copy for others in the quad
    static constexpr int kStride = kSwaps ? 33 : 32;  // pieces; a warp copies to banks that differ

    static constexpr __host__ __device__ int passes(int d) { return (d + kPass - 1) / kPass; }
    static constexpr __host__ __device__ int pieces(int d) { return passes(d) * 4 * kParts * kStride; }

    // memory: `pieces` for each warp of the CTA.
    __device__ StagedRow(uint4* memory, int d)
        : mine_(memory + threadIdx.x / 32 * pieces(d) + threadIdx.x % 32),
          d_(d),
          whole_(passes(d) - ((d - 1) % kPass < kPass / 2)),
          channel_(threadIdx.x % 32 / 4 * kBlock + chunk_of<layout>(threadIdx.x % 4, 0) * kChunk) {}

    __device__ int passes() const { return passes(d_); }
    // Passes that hold one row. The pass after them, if there is one, has room for two rows.
    __device__ int whole() const { return whole_; }
    __device__ bool shares() const { return whole_ < passes(); }
    // First channel of the lane, and whether the lane has work: only in the last pass it may have none.
    __device__ int channel(int pass) const {
        return channel_ + pass * kPass - (pass < whole_ ? 0 : my_half() * (kPass / 2));
    }
    __device__ bool works(int pass, int half) const {
        return channel(pass) < d_ && (pass < whole_ || my_half() == half);
    }

    // Starts copying a pass of a row from global memory; what was there before must have been read (see `release`).
    // Chunks 4 c ... 4 c + 3 of a block are copied at once, 64 contiguous bytes of 16-bit floats. In the layout Packed
    // they belong to lane c of the quad.
    __device__ void copy(const T* row, int pass, int half) const {
        if (!works(pass, half)) return;
        const int sub = threadIdx.x % 4;
        const int first = channel(pass) + (sub - chunk_of<layout>(sub, 0)) * kChunk;
        const uint4* from = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                uint4* const to = kSwaps ? piece(pass, sub, part) - sub + c : piece(pass, c, part);
                __pipeline_memcpy_async(to, from + (4 * c * kParts + part), 16);
            }
        }
    }

    // Called by all lanes of the warp between the last read of a pass and the next copy over it: other lanes may copy.
    __device__ void release() const {
        if constexpr (kSwaps) __syncwarp();
    }

    // Waits until any lane can read what was copied.
    __device__ void wait() const {
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncwarp();
    }

    // Undefined where nothing was copied.
    __device__ Chunk<T> chunk(int pass, int c) const {
        Chunk<T> chunk;
#pragma unroll
        for (int part = 0; part < kParts; ++part) chunk.part[part] = *piece(pass, c, part);
        return chunk;
    }

    // Two chunks of the half's share of the shared pass, different ones for every lane; i < 2.
    __device__ Chunk<T> shared_chunk(int half, int i) const {
        Chunk<T> chunk;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
            chunk.part[part] = piece(whole_, 2 * my_half() + i, part)[16 * (half - my_half())];
        return chunk;
    }
    __device__ bool shared_works() const { return channel(whole_) < d_; }

  private:
    __device__ int my_half() const { return channel_ / (kPass / 2); }
    __device__ uint4* piece(int pass, int c, int part) const { return mine_ + ((pass * 4 + c) * kParts + part) * kStride; }

    uint4* mine_;
    int d_, whole_, channel_;
};

// The squares of a row's channels, summed in float64.
class Squares {
  public:
    // Chunks of different c are summed independently.
    template <typename T>
    __device__ void add(const Chunk<T>& chunk, int c) {
        float v[kChunk];
        unpack(chunk, v);
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
            sums_[c] = __fma_rn(static_cast<double>(v[e]), static_cast<double>(v[e]), sums_[c]);
    }

    // The sum over the warp. Called by all its lanes.
    __device__ double total() const {
        double sum = (sums_[0] + sums_[1]) + (sums_[2] + sums_[3]);
#pragma unroll
        for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
        return sum;
    }

  private:
    double sums_[4] = {};
};

// Eight channels as bfloat16 bits, NaNs quiet.
template <typename T>
__device__ __forceinline__ uint4 bf16_chunk(const Chunk<T>& chunk) {
    float v[kChunk];
    unpack(chunk, v);
    uint32_t word[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i)
        word[i] = bf16_bits(__float_as_uint(v[2 * i])) | bf16_bits(__float_as_uint(v[2 * i + 1])) << 16;
    return {word[0], word[1], word[2], word[3]};
}
__device__ __forceinline__ uint4 bf16_chunk(const Chunk<__nv_bfloat16>& chunk) { return quiet(chunk.part[0]); }

}  // namespace nla
