// What the encoders share: a row as it lies in memory, what its norm decides, scales. The contract: nla_engine/codec.py.
#pragma once

#include "rows.cuh"

namespace nla {

// Added and so rounded to an integer, nearest even, whose two's complement stands in the low bits: for |v| < 2^22.
constexpr float kRounder = 12582912.0f;

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

// A lane's 32 channels of one row, packed.
template <typename T>
struct Lane {
    Chunk<T> chunk[4];
};

// Where a row goes; -1 if it is not selected, or past the end.
__device__ __forceinline__ int64_t dest_of(const EncodeArgs& args, int64_t row) {
    return row < args.rows ? __ldg(args.dest + row) : -1;
}

// Zeros unless `chosen`: nothing is read then.
template <typename T, Layout layout>
__device__ __forceinline__ Lane<T> load_lane(const EncodeArgs& args, int64_t row, int quad, int sub, bool chosen) {
    Lane<T> lane;
    const T* x = static_cast<const T*>(args.hidden) + row * args.row_stride + quad * kBlock;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const uint4* from = reinterpret_cast<const uint4*>(x + chunk_of<layout>(sub, c) * kChunk);
#pragma unroll
        for (int part = 0; part < static_cast<int>(sizeof(T) / 2); ++part)
            lane.chunk[c].part[part] = chosen ? __ldg(from + part) : uint4{0, 0, 0, 0};
    }
    return lane;
}

// What the first thread of a row finds out for the others.
struct RowState {
    float norm;
    float factor;    // 1 / (norm / sqrt(d)) / sqrt(block); 0 for rows that the codec cannot hold
    int exact_slot;  // place in the exact pool, -1: none
};

__device__ __forceinline__ RowState row_state(const EncodeArgs& args, double sum, int64_t dest) {
    RowState state;
    state.norm = __double2float_rn(__dsqrt_rn(sum));
    const bool ordinary = is_ordinary(state.norm);
    state.factor = ordinary ? __fmul_rn(__fdiv_rn(1.0f, __fdiv_rn(state.norm, args.sqrt_d)), args.unit) : 0.0f;
    state.exact_slot = -1;
    args.norm[dest] = state.norm;
    const bool keep = !(ordinary && state.norm <= args.sink_norm) && state.norm != 0.0f;
    if (keep && args.codec.kind != CodecKind::bf16) {
        const int slot = atomicAdd(args.exact_count, 1);
        if (slot < args.exact_capacity) {
            args.exact_dest[slot] = dest;
            state.exact_slot = slot;
        }
    }
    return state;
}

// codec: scale = float16(clip * largest / top) and its reciprocal, 0 if the scale is.
struct Scale {
    __half half;
    float value, reciprocal;
};

__device__ __forceinline__ Scale make_scale(float range, float inverse_top) {
    Scale scale;
    scale.half = __float2half_rn(__fmul_rn(range, inverse_top));
    scale.value = __half2float(scale.half);
    scale.reciprocal = scale.value > 0.0f ? __frcp_rn(scale.value) : 0.0f;
    return scale;
}

__device__ __forceinline__ float largest_in_lane(const float (&v)[kPerLane]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) largest = fmaxf(largest, fabsf(v[i]));
    return largest;
}

__device__ __forceinline__ float clamp(float v, float top) { return fminf(fmaxf(v, -top), top); }

// A lane's channels of a row that is kept exactly, or of codec bf16.
template <typename T, Layout layout>
__device__ __forceinline__ void store_bf16(const Lane<T>& lane, uint16_t* row, int quad, int sub) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        float v[kChunk];
        unpack(lane.chunk[c], v);
        *reinterpret_cast<uint4*>(row + quad * kBlock + chunk_of<layout>(sub, c) * kChunk) = bf16_chunk(v);
    }
}

// Sum of the squares of a quad's block, in all its lanes.
template <typename T>
__device__ __forceinline__ double sum_of_squares(const Lane<T>& lane) {
    double sum = 0.0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        float v[kChunk];
        unpack(lane.chunk[c], v);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) sum = __fma_rn(static_cast<double>(v[e]), static_cast<double>(v[e]), sum);
    }
    sum += __shfl_xor_sync(kAll, sum, 1);
    return sum + __shfl_xor_sync(kAll, sum, 2);
}

// The state of each of a CTA's rows from the sums of its blocks, double [rows, quads]: a warp takes a row.
__device__ __forceinline__ void find_states(const EncodeArgs& args, int64_t first, int rows, int quads,
                                            const double* partial, RowState* states, int warp, int warps, int lane) {
    for (int r = warp; r < rows; r += warps) {
        double total = 0.0;
        for (int q = lane; q < quads; q += 32) total += partial[r * quads + q];
#pragma unroll
        for (int mask = 16; mask; mask /= 2) total += __shfl_xor_sync(kAll, total, mask);
        const int64_t dest = dest_of(args, first + r);
        if (lane == 0 && dest >= 0) states[r] = row_state(args, total, dest);
    }
}

// Rows of 16-bit floats, blocks of 128 and 16-byte accesses (encode_int8.cu).
template <typename T>
void launch_int8(const EncodeArgs& args, int device, cudaStream_t stream);

}  // namespace nla
