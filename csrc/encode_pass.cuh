// A pass of the fast encoder: eight blocks of 128 channels at once, a quad of lanes each. Rotation, scales, codes.
//
// 16-bit floats: six of the seven steps of the rotation are products with the Hadamard matrix of order 16 on the tensor
// cores. Their factors, the row and +-1, are exact. The hardware sums in its own order and rounds, which shows where
// the float32 sums of a block are not exact (see codec/rows.py). A chunk's four words, as they are in memory, are a
// lane's part of the first factor A [16, 16]:
//
//     row of A      the quad in the warp (8), channel bit 1 (2)
//     column of A   channel bit 0 (2), the lane in the quad (4), channel bit 2 (2)
//
// A column of the result means the same as in A, so output and input have the same layout. The lane in the quad is
// channel bits 3 and 4, or 5 and 6 if the layout is Packed. The other two select one of the lane's chunks: each chunk of
// the result sums the products of all four, with their signs. Bit 1 remains.
#pragma once

#include <type_traits>

#include "encode.cuh"
#include "mma.cuh"
#include "staged_row.cuh"

namespace nla {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTensorCores = false;     // none that take bfloat16: these cards rotate as the host does
#else
constexpr bool kTensorCores = true;
#endif

// ---- the rotation on tensor cores ----

// This lane's part of the matrix of order 16, the second factor: b[half][pair] holds rows k, k + 1 of column n, with
// k = 2 sub + 8 pair and n = 8 half + g.
template <typename T>
struct Hadamard {
    uint32_t b[2][2];

    __device__ explicit Hadamard(int lane) {
        constexpr uint32_t one = std::is_same_v<T, __half> ? 0x3c00 : 0x3f80;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int k = 2 * (lane & 3) + 8 * pair, n = 8 * half + lane / 4;
                const uint32_t low = one | (__popc(k & n) & 1) << 15, high = one | (__popc((k + 1) & n) & 1) << 15;
                b[half][pair] = low | high << 16;
            }
        }
    }

    // v = sqrt(128) H x for a quad's block, of which the lane has four chunks. Called by all lanes of the warp.
    __device__ void rotate(const Chunk<T> (&x)[4], float (&v)[kPerLane]) const {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) v[i] = 0.0f;
#pragma unroll
        for (int from = 0; from < 4; ++from) {
#pragma unroll
            for (int to = 0; to < 4; ++to) {
                const int common = from & to;  // gives the sign of chunk `from` in chunk `to`
                const uint32_t sign = (common == 1 || common == 2) ? 0x80008000u : 0u;
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    multiply(v + to * kChunk + 4 * half, x[from].part[0], b[half][0] ^ sign, b[half][1] ^ sign, T{});
            }
        }
        butterfly_in_lane<2>(v);
    }
};

// ---- codes of a quad's block, 32 channels per lane ----

__device__ __forceinline__ float largest_in_lane(const float (&v)[kPerLane]) {
    float largest[4] = {};  // four independent chains
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) largest[i % 4] = fmaxf(largest[i % 4], fabsf(v[i]));
    return fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
}

// One scale per block; v is y / factor.
// at: as below; called by all lanes of the warp.
__device__ __forceinline__ void store_int8(float (&v)[kPerLane], float factor, int8_t* codes, __half* scales, int64_t at,
                                           int sub) {
    float largest = largest_in_lane(v);
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 2));
    const Scale scale = make_scale(__fmul_rn(largest, factor), 1.0f / 127.0f);
    const float reciprocal = whole_reciprocal(scale, factor);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) v[i] = shifted_code(v[i], reciprocal);
    if (scale.is_subnormal()) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) v[i] = fminf(fmaxf(v[i], kRounder - 127.0f), kRounder + 127.0f);
    }
    uint32_t word[kPerLane / 4];
#pragma unroll
    for (int i = 0; i < kPerLane / 4; ++i) {
        const float* const code = v + 4 * i;
        const uint32_t low = __byte_perm(__float_as_uint(code[0]), __float_as_uint(code[1]), 0x0040);
        const uint32_t high = __byte_perm(__float_as_uint(code[2]), __float_as_uint(code[3]), 0x0040);
        word[i] = __byte_perm(low, high, 0x5410);
    }
    if (at < 0) return;
#pragma unroll
    for (int c = 0; c < 4; ++c)
        reinterpret_cast<uint2*>(codes + at)[c * kChunkStep<Layout::Spread>] = {word[2 * c], word[2 * c + 1]};
    if (sub == 0) scales[at / kBlock] = scale.half;
}

// Sums of squared distances (codec/rows.py). fine: a group's fine codes, two to a word, the odd one above, on top of
// kRounderBits. In a product with 16 * divisor, each half's upper byte is a distance. From the lower half, -8 to 7 spill
// over. That never reaches the upper byte, because the upper half is a multiple of 16, to which 8 is added.
__device__ __forceinline__ void add_distances(const uint32_t (&fine)[kPerLane / 2], int (&sums)[kDivisors]) {
#pragma unroll
    for (int k = 0; k < kDivisors; ++k) {
        const uint32_t times = 16 * (kFirstDivisor + k), offset = 0x00880088u - times * kRounderBits;
        sums[k] = 0;
#pragma unroll
        for (int i = 0; i < kPerLane / 2; i += 2) {
            const uint32_t four = __byte_perm(fine[i] * times + offset, fine[i + 1] * times + offset, 0x7531);
            sums[k] = __dp4a(static_cast<int>(four), static_cast<int>(four), sums[k]);
        }
    }
}

// One group per lane; v is y / factor. codes: the lane's; scales: its group's.
__device__ __forceinline__ void store_int4(float (&v)[kPerLane], float factor, uint8_t* codes, __half* scales) {
    const float range = __fmul_rn(largest_in_lane(v), factor);
    Scale scale = make_scale(range, 1.0f / 7.0f);
    const float to_fine = fine_reciprocal(whole_reciprocal(scale, factor));
    uint32_t fine[kPerLane / 2];
#pragma unroll
    for (int i = 0; i < kPerLane / 2; ++i)
        fine[i] = (__float_as_uint(shifted_code(v[2 * i + 1], to_fine)) << 16) +
                  __float_as_uint(shifted_code(v[2 * i], to_fine));
    int sums[kDivisors];
    add_distances(fine, sums);
    const bool clamped = scale.is_subnormal();
    if (!clamped) scale = cheapest_scale(sums, range);
    const float reciprocal = whole_reciprocal(scale, factor);
    constexpr float kShifted = kRounder + 8.0f;  // its lowest bits hold code + 8
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) v[i] = __fmaf_rn(v[i], reciprocal, kShifted);
    if (clamped) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) v[i] = fminf(fmaxf(v[i], kShifted - 7.0f), kShifted + 7.0f);
    }
    uint32_t word[kPerLane / 8];
#pragma unroll
    for (int i = 0; i < kPerLane / 8; ++i) {
        uint32_t two[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float* const code = v + 8 * i + 2 * k;
            two[k] = (__float_as_uint(code[1]) << 4) + __float_as_uint(code[0]);
        }
        word[i] = __byte_perm(__byte_perm(two[0], two[1], 0x0040), __byte_perm(two[2], two[3], 0x0040), 0x5410);
    }
    *reinterpret_cast<uint4*>(codes) = {word[0], word[1], word[2], word[3]};
    *scales = scale.half;
}

// ---- a pass: eight blocks, one quad each ----

template <CodecKind kind>
constexpr Layout layout_of = kind == CodecKind::int4 ? Layout::Packed : Layout::Spread;

template <typename T, CodecKind kind>
class Rotation {
  public:
    __device__ explicit Rotation(int lane) : matrix_(lane), sub_(lane % 4) {}

    // v = sqrt(128) H x for a quad's block, of which the lane has four chunks. Called by all lanes of the warp.
    __device__ void apply(const Chunk<T> (&x)[4], float (&v)[kPerLane]) const {
        if constexpr (kOnTensorCores) {
            matrix_.rotate(x, v);
        } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) unpack(x[c], v + c * kChunk);
            rotate<layout_of<kind>>(v, sub_);
        }
    }

  private:
    static constexpr bool kOnTensorCores = kTensorCores && sizeof(T) == 2;
    Hadamard<std::conditional_t<kOnTensorCores, T, __half>> matrix_;
    int sub_;
};

// at: index of the lane's first channel among all rows' channels; < 0: store nothing. Called by all lanes of the warp.
template <CodecKind kind>
__device__ __forceinline__ void store_codes(const EncodeArgs& args, float (&v)[kPerLane], float factor, int64_t at) {
    if (factor == 0.0f) {  // Inf * 0 is not 0
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) v[i] = 0.0f;
    }
    __half* const scales = static_cast<__half*>(args.scales);
    if constexpr (kind == CodecKind::int8) {
        store_int8(v, factor, static_cast<int8_t*>(args.codes), scales, at, threadIdx.x % 4);
    } else if (at >= 0) {
        store_int4(v, factor, static_cast<uint8_t*>(args.codes) + at / 2, scales + at / kPerLane);
    }
}

}  // namespace nla
