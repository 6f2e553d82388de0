// Shared by the encoder and the decoder: the layout of a row over threads, and the Hadamard rotation.
//
// Fast layout (block 128): a quad of 4 neighbouring lanes has one block of 128 channels, 32 per lane, in 4 chunks of 8
// (16 bytes of bfloat16). Channel = 8 * chunk + e, e < 8. Chunk of lane s (0..3), slot c (0..3):
//     Spread   4 * c + s     a quad's access is 64 contiguous bytes; channel bits 5, 6 are within the lane
//     Packed   4 * s + c     a lane has 32 neighbouring channels (an int4 group); channel bits 3, 4 are within the lane
// The other two bits are across lanes: two shuffle stages of seven, in either layout.
//
// Every float operation here is a single rounded one (__fadd_rn ...), in the order of nla_engine/codec/rows.py. The
// compiler may neither fuse nor reorder them, so the bits agree.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "checks.hpp"
#include "device.cuh"
#include "encode.hpp"

namespace nla {

constexpr int kBlock = 128;      // channels of a block on the fast path
constexpr int kPerLane = 32;     // of these, per lane
constexpr int kChunk = 8;        // neighbouring channels that move together
constexpr unsigned kAll = 0xffffffffu;

enum class Layout { Spread, Packed };

// Distance in chunks from a lane's slot to its next.
template <Layout layout>
constexpr int kChunkStep = layout == Layout::Spread ? 4 : 1;

template <Layout layout>
__device__ __forceinline__ int chunk_of(int sub, int slot) {
    return sub * (layout == Layout::Spread ? 1 : 4) + slot * kChunkStep<layout>;
}

// Norms outside this range (or not finite) cannot be divided by: NORM_RANGE of codec/loops.py.
__device__ __forceinline__ bool is_ordinary(float norm) { return norm >= 1e-30f && norm <= 1e30f; }

// float32 bits -> bfloat16 bits, nearest even, NaN stays NaN: bf16_bits of codec/rows.py.
__device__ __forceinline__ uint32_t bf16_bits(uint32_t bits) {
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// Two or eight bfloat16 -> the same with NaNs made quiet, as bf16_bits does.
__device__ __forceinline__ uint32_t quiet(uint32_t two) {
    const uint32_t above = (two & 0x7fff7fffu) + 0x007f007fu;  // bits 15 and 31: whether it is more than Inf
    return two | (above & 0x80008000u) >> 9;
}
__device__ __forceinline__ uint4 quiet(const uint4& eight) {
    return {quiet(eight.x), quiet(eight.y), quiet(eight.z), quiet(eight.w)};
}

// One butterfly of step `step` among the lane's own 32 values.
template <int step>
__device__ __forceinline__ void butterfly_in_lane(float (&v)[kPerLane]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        if (i & step) continue;
        const float a = v[i], b = v[i + step];
        v[i] = __fadd_rn(a, b);
        v[i + step] = __fsub_rn(a, b);
    }
}

// One butterfly with the lane at distance `mask`: a + b in the lower lane, a - b in the upper. Products with +-1 are
// exact.
template <int mask>
__device__ __forceinline__ void butterfly_across(float (&v)[kPerLane], int sub) {
    const float sign = (sub & mask) ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) v[i] = __fmaf_rn(v[i], sign, __shfl_xor_sync(kAll, v[i], mask));
}

// v = sqrt(128) H v over a quad's block of 128: steps 1, 2, 4 ... 64. Called by all lanes of the warp.
template <Layout layout>
__device__ __forceinline__ void rotate(float (&v)[kPerLane], int sub) {
    butterfly_in_lane<1>(v);
    butterfly_in_lane<2>(v);
    butterfly_in_lane<4>(v);
    if constexpr (layout == Layout::Spread) {
        butterfly_across<1>(v, sub);
        butterfly_across<2>(v, sub);
        butterfly_in_lane<8>(v);
        butterfly_in_lane<16>(v);
    } else {
        butterfly_in_lane<8>(v);
        butterfly_in_lane<16>(v);
        butterfly_across<1>(v, sub);
        butterfly_across<2>(v, sub);
    }
}

// The same over row[d] in shared memory, blocks of any power of two. Called by the whole CTA. Ends with a barrier
// unless block is 1.
__device__ __forceinline__ void rotate_shared(float* row, int d, int block) {
    for (int step = 1; step < block; step *= 2) {
        for (int pair = threadIdx.x; pair < d / 2; pair += blockDim.x) {
            const int low = (pair / step) * 2 * step + pair % step;
            const float a = row[low], b = row[low + step];
            row[low] = __fadd_rn(a, b);
            row[low + step] = __fsub_rn(a, b);
        }
        __syncthreads();
    }
}

// ---- host side ----

inline void check_codec(const CodecShape& codec) {
    check_positive(codec.d, "d");
    check(is_power_of_two(codec.block) && codec.block <= kBlock && codec.d % codec.block == 0, "block",
          std::to_string(codec.block) + " is not a power of two <= 128 that divides d");
    check(is_power_of_two(codec.group) && codec.block % codec.group == 0, "group",
          std::to_string(codec.group) + " does not divide the block");
    check(codec.kind != CodecKind::int4 || (codec.group >= 2 && codec.group <= 32), "group",
          "int4 takes groups of 2 to 32");
}

inline float float_sqrt(int d) { return static_cast<float>(std::sqrt(static_cast<double>(d))); }
inline float float_unit(int block) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(block))); }

}  // namespace nla
