// Codec bytes -> rows, for reading a stage or a store back on the device.
//
//     x' = norm / sqrt(d) * (H (scale * code))      bits as in nla_engine/codec.py `_decode`
//
// Pointers and shapes: DecodeArgs in encode.hpp. The layout of a row over threads: rows.cuh.
#include "rows.cuh"

namespace nla {
namespace {

// Eight neighbouring channels out, 16-byte stores.
__device__ __forceinline__ void store_chunk(float* out, const float* v) {
    reinterpret_cast<float4*>(out)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(out)[1] = {v[4], v[5], v[6], v[7]};
}
__device__ __forceinline__ void store_chunk(uint16_t* out, const float* v) {
    uint32_t word[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i)
        word[i] = bf16_bits(__float_as_uint(v[2 * i])) | bf16_bits(__float_as_uint(v[2 * i + 1])) << 16;
    *reinterpret_cast<uint4*>(out) = {word[0], word[1], word[2], word[3]};
}

__device__ __forceinline__ void store_value(float* out, float v) { *out = v; }
__device__ __forceinline__ void store_value(uint16_t* out, float v) {
    *out = static_cast<uint16_t>(bf16_bits(__float_as_uint(v)));
}

// Blocks of 128: a quad of lanes per block of a row, one pass, no exchange between quads.
template <typename Out, CodecKind kind>
__global__ void __launch_bounds__(256) decode_fast(const DecodeArgs args, int64_t quads) {
    constexpr Layout layout = kind == CodecKind::int4 ? Layout::Packed : Layout::Spread;
    const int d = args.codec.d, per_row = d / kBlock, sub = threadIdx.x & 3;
    const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / 4);
    // Whole warps stay together to the end, because the rotation shuffles; quads past the end only look on.
    for (int64_t base = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 4); base < quads; base += step) {
        const int64_t place = base + threadIdx.x / 4;
        const bool works = place < quads;
        const int64_t row = works ? place / per_row : 0;
        const int quad = works ? static_cast<int>(place % per_row) : 0;
        const float norm = works ? args.norm[row] : 0.0f;
        const bool ordinary = is_ordinary(norm);
        const __half* scales = static_cast<const __half*>(args.scales) + row * (d / args.codec.group);
        float v[kPerLane];
        if constexpr (kind == CodecKind::int8) {
            const int8_t* codes = static_cast<const int8_t*>(args.codes) + row * d + quad * kBlock;
            const float scale = __half2float(scales[quad]);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const uint2 two = *reinterpret_cast<const uint2*>(codes + chunk_of<layout>(sub, c) * kChunk);
#pragma unroll
                for (int e = 0; e < kChunk; ++e) {
                    const auto code = static_cast<int8_t>((e < 4 ? two.x : two.y) >> (8 * (e % 4)));
                    v[c * kChunk + e] = __fmul_rn(static_cast<float>(code), scale);
                }
            }
        } else {
            const uint8_t* codes = static_cast<const uint8_t*>(args.codes) + row * (d / 2) + quad * (kBlock / 2);
            const uint4 four = *reinterpret_cast<const uint4*>(codes + sub * 16);
            const uint32_t word[4] = {four.x, four.y, four.z, four.w};
            const float scale = __half2float(scales[quad * 4 + sub]);
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) {
                const int code = static_cast<int>(word[i / 8] >> (4 * (i % 8)) & 15u) - 8;
                v[i] = __fmul_rn(static_cast<float>(code), scale);
            }
        }
        rotate<layout>(v, sub, args.unit);
        if (!works) continue;
        const float rms = __fdiv_rn(norm, args.sqrt_d);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) v[i] = ordinary ? __fmul_rn(v[i], rms) : 0.0f;
        Out* out = static_cast<Out*>(args.out) + row * d + quad * kBlock;
#pragma unroll
        for (int c = 0; c < 4; ++c) store_chunk(out + chunk_of<layout>(sub, c) * kChunk, v + c * kChunk);
    }
}

// Any width: a CTA a row, the row in shared memory (float[d]).
template <typename Out, CodecKind kind>
__global__ void __launch_bounds__(256) decode_any(const DecodeArgs args) {
    extern __shared__ float row[];
    const int d = args.codec.d, group = args.codec.group, groups = d / group;
    for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x) {
        __syncthreads();  // the row before is done with
        const float norm = args.norm[r];
        const bool ordinary = is_ordinary(norm);
        const __half* scales = static_cast<const __half*>(args.scales) + r * groups;
        for (int i = threadIdx.x; i < d; i += blockDim.x) {
            int code;
            if constexpr (kind == CodecKind::int8) {
                code = static_cast<const int8_t*>(args.codes)[r * d + i];
            } else {
                code = (static_cast<const uint8_t*>(args.codes)[r * (d / 2) + i / 2] >> (4 * (i % 2)) & 15) - 8;
            }
            row[i] = __fmul_rn(static_cast<float>(code), __half2float(scales[i / group]));
        }
        __syncthreads();
        rotate_shared(row, d, args.codec.block, args.unit);
        const float rms = __fdiv_rn(norm, args.sqrt_d);
        Out* out = static_cast<Out*>(args.out) + r * d;
        for (int i = threadIdx.x; i < d; i += blockDim.x) store_value(out + i, ordinary ? __fmul_rn(row[i], rms) : 0.0f);
    }
}

// bf16 codes: only widened, or copied.
template <typename Out>
__global__ void __launch_bounds__(256) widen(const uint16_t* codes, Out* out, int64_t values) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < values; i += step)
        store_value(out + i, __uint_as_float(static_cast<uint32_t>(codes[i]) << 16));
}

template <typename Out, CodecKind kind>
void launch(const DecodeArgs& args, int device, cudaStream_t stream) {
    const int d = args.codec.d;
    if (d % kBlock == 0 && is_aligned(args.codes, 16) && is_aligned(args.out, 16)) {
        const int64_t quads = args.rows * (d / kBlock);
        const int grid = persistent_grid(decode_fast<Out, kind>, 256, 0, (quads + 63) / 64, device);
        decode_fast<Out, kind><<<grid, 256, 0, stream>>>(args, quads);
    } else {
        const size_t shared = sizeof(float) * d;
        allow_shared(decode_any<Out, kind>, shared, device);
        const int grid = persistent_grid(decode_any<Out, kind>, 256, shared, args.rows, device);
        decode_any<Out, kind><<<grid, 256, shared, stream>>>(args);
    }
}

template <typename Out>
void launch_kind(const DecodeArgs& args, int device, cudaStream_t stream) {
    switch (args.codec.kind) {
        case CodecKind::int8: launch<Out, CodecKind::int8>(args, device, stream); break;
        case CodecKind::int4: launch<Out, CodecKind::int4>(args, device, stream); break;
        case CodecKind::bf16: {
            const int64_t values = args.rows * args.codec.d;
            const int grid = persistent_grid(widen<Out>, 256, 0, (values + 255) / 256, device);
            widen<Out><<<grid, 256, 0, stream>>>(static_cast<const uint16_t*>(args.codes), static_cast<Out*>(args.out),
                                                 values);
            break;
        }
    }
    cuda_check(cudaGetLastError(), "decode_rows");
}

}  // namespace

void decode_rows(int device, uintptr_t stream, DecodeArgs args) {
    check_codec(args.codec);
    check(args.rows >= 0, "rows", "is negative");
    if (args.rows == 0) return;
    check_pointer(args.codes, "codes");
    check_pointer(args.out, "out");
    if (args.codec.kind != CodecKind::bf16) {
        check_pointer(args.scales, "scales");
        check_pointer(args.norm, "norm");
    }
    check(args.output != FloatKind::float16, "out", "is float16: decode to float32 or bfloat16");
    args.sqrt_d = float_sqrt(args.codec.d);
    args.unit = float_unit(args.codec.block);
    const OnDevice current(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (args.output == FloatKind::float32) return launch_kind<float>(args, device, cuda_stream);
    launch_kind<uint16_t>(args, device, cuda_stream);
}

}  // namespace nla
