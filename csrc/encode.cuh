// Shared by both encoders: where a row goes, what its norm decides, scales. The contract: nla_engine/codec/rows.py.
#pragma once

#include <cfloat>

#include "rows.cuh"

namespace nla {

// Adding it rounds v to an integer, nearest even, whose two's complement is in the low bits, if |v| < 2^22.
constexpr float kRounder = 12582912.0f;
constexpr uint32_t kRounderBits = 0x4b400000;
constexpr float kSmallestNormalHalf = 6.103515625e-05f;

// Where a row goes; negative if it is not selected, or past the end.
__device__ __forceinline__ int64_t dest_of(const EncodeArgs& args, int64_t row) {
    return row < args.rows ? __ldg(args.dest + row) : -1;
}

struct RowState {
    float norm;
    float factor;  // 1 / (norm / sqrt(d)) / sqrt(block); 0 for rows that the codec cannot hold
    bool keep;     // whether the row is also kept exactly
};

// From the sum of a row's squares.
__device__ __forceinline__ RowState state_of(const EncodeArgs& args, double sum) {
    RowState state;
    state.norm = __double2float_rn(__dsqrt_rn(sum));
    const bool ordinary = is_ordinary(state.norm);
    state.factor = ordinary ? __fmul_rn(__fdiv_rn(1.0f, __fdiv_rn(state.norm, args.sqrt_d)), args.unit) : 0.0f;
    state.keep = args.codec.kind != CodecKind::bf16 && !(ordinary && state.norm <= args.sink_norm) && state.norm != 0.0f;
    return state;
}

// A place in the exact pool for the row that goes to `dest`, or nullptr if the pool is full. Called by one thread.
__device__ __forceinline__ uint16_t* take_exact(const EncodeArgs& args, int64_t dest) {
    const int slot = atomicAdd(args.exact_count, 1);
    if (slot >= args.exact_capacity) return nullptr;
    args.exact_dest[slot] = dest;
    return args.exact + static_cast<int64_t>(slot) * args.codec.d;
}

// scale = float16(range / top) and its reciprocal, 0 if the scale is 0. range: of y, that is with the row's factor.
struct Scale {
    __half half;
    float value, reciprocal;

    // A normal float16 is within 2^-11 of the range / top, so codes stay within +-top. Others must be clamped.
    __device__ bool is_subnormal() const { return value < kSmallestNormalHalf; }
};

__device__ __forceinline__ Scale make_scale(float range, float inverse_top) {
    Scale scale;
    scale.half = __float2half_rn(__fmul_rn(range, inverse_top));
    scale.value = __half2float(scale.half);
    scale.reciprocal = scale.value > 0.0f ? __frcp_rn(scale.value) : 0.0f;
    return scale;
}

// The multiplier of rotated values: factor / scale, capped at the largest float32, so that 0 stays 0.
__device__ __forceinline__ float whole_reciprocal(const Scale& scale, float factor) {
    return fminf(__fmul_rn(scale.reciprocal, factor), FLT_MAX);
}

// kRounder + the code of a value before it is clamped to +-top: the product, rounded once.
__device__ __forceinline__ float shifted_code(float value, float reciprocal) {
    return __fmaf_rn(value, reciprocal, kRounder);
}

// ---- the clip of an int4 group ----

constexpr int kFirstDivisor = 29;  // INT4_DIVISORS of codec/rows.py: this one and the next two
constexpr int kDivisors = 3;

// The multiplier of rotated values that gives a group's fine codes, of which 4096 / 29 make a code at clip 1, from the
// multiplier that gives these.
__device__ __forceinline__ float fine_reciprocal(float reciprocal) {
    return fminf(__fmul_rn(reciprocal, static_cast<float>(4096.0 / kFirstDivisor)), FLT_MAX);
}

// sums[i]: the squared distances of a group at divisor kFirstDivisor + i, less than 2^24. The scale that costs least.
__device__ __forceinline__ Scale cheapest_scale(const int (&sums)[kDivisors], float range) {
    float least = INFINITY, clip = 1.0f;
#pragma unroll
    for (int i = 0; i < kDivisors; ++i) {
        const int divisor = kFirstDivisor + i;
        const float cost = __fmul_rn(static_cast<float>(sums[i]), static_cast<float>(1.0 / (divisor * divisor)));
        if (cost < least) {
            least = cost;
            clip = static_cast<float>(static_cast<double>(kFirstDivisor) / divisor);
        }
    }
    return make_scale(__fmul_rn(range, clip), 1.0f / 7.0f);
}

// For blocks of 128 and 16-byte accesses (encode_fast.cu). False if it does not take these arguments.
template <typename T>
bool launch_fast(const EncodeArgs& args, int device, cudaStream_t stream);

}  // namespace nla
