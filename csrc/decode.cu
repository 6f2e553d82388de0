// Codec bytes -> rows, for reading a stage or a store back on the device.
//
//     x' = norm / sqrt(d) * (H (scale * code))      the bits of nla_engine/codec/loops.py `decoder`
//
// Pointers and shapes: DecodeArgs in encode.hpp. The layout of a row over threads: rows.cuh.
#include "rows.cuh"

namespace nla {
namespace {

// Stores eight neighbouring channels, 16 bytes at a time. Finite scales give no NaN, so conversion equals bf16_bits.
__device__ __forceinline__ void store_chunk(float* out, const float* v) {
    reinterpret_cast<float4*>(out)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(out)[1] = {v[4], v[5], v[6], v[7]};
}
__device__ __forceinline__ void store_chunk(uint16_t* out, const float* v) {
    uint32_t word[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
        word[i] = reinterpret_cast<const uint32_t&>(two);
    }
    *reinterpret_cast<uint4*>(out) = {word[0], word[1], word[2], word[3]};
}

__device__ __forceinline__ void store_value(float* out, float v) { *out = v; }
__device__ __forceinline__ void store_value(uint16_t* out, float v) {
    *out = static_cast<uint16_t>(bf16_bits(__float_as_uint(v)));
}

// What a lane reads of one block of 128, as it is in memory: 4 chunks of codes, and their scales.
template <CodecKind kind>
struct Packed {
    static constexpr int kWords = kind == CodecKind::int8 ? 2 : 1;  // of 4 bytes, per chunk
    static constexpr int kScales = kind == CodecKind::int8 ? 1 : 4;  // per block; in int4 one per chunk of a lane
    uint32_t codes[4][kWords];
    uint32_t scales[(kScales + 1) / 2];
    float norm;

    __device__ __forceinline__ float scale(int chunk) const {
        const uint32_t word = kScales == 1 ? scales[0] : scales[chunk / 2] >> (16 * (chunk % 2));
        return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
    }
};

// The codes of block `place` (numbered across all rows) and the norm of its row.
template <CodecKind kind>
__device__ __forceinline__ Packed<kind> load_packed(const DecodeArgs& args, int64_t place, int64_t row, int sub) {
    using P = Packed<kind>;
    P packed;
    const uint32_t* codes = static_cast<const uint32_t*>(args.codes) + place * (kBlock / kChunk * P::kWords);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int chunk = chunk_of<Layout::Spread>(sub, c);
        if constexpr (kind == CodecKind::int8) {
            const uint2 two = __ldg(reinterpret_cast<const uint2*>(codes) + chunk);
            packed.codes[c][0] = two.x;
            packed.codes[c][1] = two.y;
        } else {
            packed.codes[c][0] = __ldg(codes + chunk);
        }
    }
    if constexpr (kind == CodecKind::int8) {
        packed.scales[0] = __ldg(static_cast<const unsigned short*>(args.scales) + place);
    } else {
        const uint2 four = __ldg(static_cast<const uint2*>(args.scales) + place);
        packed.scales[0] = four.x;
        packed.scales[1] = four.y;
    }
    packed.norm = __ldg(args.norm + row);
    return packed;
}

// code * scale, given base + code' (the code's bits in the mantissa of a power of two `base`) and `zero`, the value of
// code 0 in that form. One operation, where conversion has an eighth of the throughput. It is exact: zero has at most
// 13 bits, scale (finite, not negative) 11. But code * 0 gives +0 whatever the code's sign; `signed_zero` keeps the
// sign, in two operations.
template <bool signed_zero>
__device__ __forceinline__ float scaled_code(uint32_t bits, float zero, float scale) {
    const float shifted = __uint_as_float(bits);
    if constexpr (signed_zero) return __fmul_rn(__fsub_rn(shifted, zero), scale);
    return __fmaf_rn(shifted, scale, __fmul_rn(-zero, scale));
}

template <bool signed_zero>
__device__ __forceinline__ void scaled(const uint32_t (&codes)[2], float scale, float* out) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
        const uint32_t shifted = codes[e / 4] ^ 0x80808080u;  // two's complement + 128
        // 2^15 + byte: the byte is in bits 8 to 15
        const uint32_t bits = __byte_perm(shifted, 0x47000000u, 0x7604 | (e % 4) << 4);
        out[e] = scaled_code<signed_zero>(bits, 32768.0f + 128.0f, scale);
    }
}
template <bool signed_zero>
__device__ __forceinline__ void scaled(const uint32_t (&codes)[1], float scale, float* out) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
        // Nibble e in bits 8 to 11, 12 to 15 or 16 to 19: 2^15, 2^11 or 2^7 + nibble
        const uint32_t word = e < 2 ? codes[0] << 8 : e < 5 ? codes[0] : codes[0] >> 12;
        const int bit = e < 2 ? 8 + 4 * e : e < 5 ? 4 * e : 4 * e - 12;
        const uint32_t base = static_cast<uint32_t>(127 + 23 - bit) << 23;
        out[e] = scaled_code<signed_zero>((word & (15u << bit)) | base, __uint_as_float(base) + 8.0f, scale);
    }
}

// Blocks of 128: a quad of lanes per block, no exchange between quads. The next block's codes are loaded while one is
// decoded. places: number of blocks of all rows.
template <typename Out, CodecKind kind>
__global__ void __launch_bounds__(256, 4) decode_fast(const DecodeArgs args, int64_t places) {
    using P = Packed<kind>;
    const int per_row = args.codec.d / kBlock, sub = threadIdx.x & 3;
    const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / 4);
    const int64_t step_rows = step / per_row;
    const int step_quads = static_cast<int>(step % per_row);
    // Whole warps stay together to the end, because the rotation shuffles. Quads past the end repeat the last block.
    int64_t base = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 4);
    int64_t place = base + threadIdx.x / 4;
    int64_t row = place / per_row;
    int quad = static_cast<int>(place % per_row);
    const auto load = [&] {
        const bool works = place < places;
        return load_packed<kind>(args, works ? place : places - 1, works ? row : args.rows - 1, sub);
    };
    P next = load();
    for (; base < places; base += step) {
        const P packed = next;
        const int64_t here = place;
        place += step;  // row and quad follow without a division
        row += step_rows;
        quad += step_quads;
        if (quad >= per_row) {
            quad -= per_row;
            ++row;
        }
        next = load();

        // A row that is kept elsewhere is decoded as +0 throughout.
        const bool ordinary = is_ordinary(packed.norm);
        const float rms = ordinary ? __fdiv_rn(packed.norm, args.sqrt_d) : 0.0f;
        float scale[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) scale[c] = ordinary ? packed.scale(P::kScales == 1 ? 0 : c) : 0.0f;
        float v[kPerLane];
        if (ordinary && (scale[0] == 0.0f || scale[1] == 0.0f || scale[2] == 0.0f || scale[3] == 0.0f)) {
#pragma unroll
            for (int c = 0; c < 4; ++c) scaled<true>(packed.codes[c], scale[c], v + c * kChunk);
        } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) scaled<false>(packed.codes[c], scale[c], v + c * kChunk);
        }
        rotate<Layout::Spread>(v, sub);
        if (here >= places) continue;
        Out* out = static_cast<Out*>(args.out) + here * kBlock;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], args.unit), rms);
#pragma unroll
        for (int c = 0; c < 4; ++c) store_chunk(out + chunk_of<Layout::Spread>(sub, c) * kChunk, v + c * kChunk);
    }
}

// Any width: one CTA per row, the row in shared memory (float[d]).
template <typename Out, CodecKind kind>
__global__ void __launch_bounds__(256) decode_any(const DecodeArgs args) {
    extern __shared__ float row[];
    const int d = args.codec.d, group = args.codec.group, groups = d / group;
    for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x) {
        __syncthreads();  // all threads have finished the row before
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
        rotate_shared(row, d, args.codec.block);
        const float rms = __fdiv_rn(norm, args.sqrt_d);
        Out* out = static_cast<Out*>(args.out) + r * d;
        for (int i = threadIdx.x; i < d; i += blockDim.x)
            store_value(out + i, ordinary ? __fmul_rn(__fmul_rn(row[i], args.unit), rms) : 0.0f);
    }
}

// bf16 codes are only widened or copied: codes uint16 [values] -> out Out [values].
template <typename Out>
__global__ void __launch_bounds__(256) widen(const uint16_t* codes, Out* out, int64_t values) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < values; i += step)
        store_value(out + i, __uint_as_float(static_cast<uint32_t>(codes[i]) << 16));
}

__device__ __forceinline__ void store_wide(uint16_t* out, const uint4& eight) {
    *reinterpret_cast<uint4*>(out) = quiet(eight);
}
__device__ __forceinline__ void store_wide(float* out, const uint4& eight) {
    const uint32_t word[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 2; ++i)
        reinterpret_cast<uint4*>(out)[i] = {word[2 * i] << 16, word[2 * i] & 0xffff0000u, word[2 * i + 1] << 16,
                                            word[2 * i + 1] & 0xffff0000u};
}

// The same if both are 16-byte aligned: codes uint16 [chunks, 8] -> out Out [chunks, 8]. A thread takes kWideChunks
// chunks, all loads before the first store.
constexpr int kWideChunks = 8;
template <typename Out>
__global__ void __launch_bounds__(256) widen_fast(const uint4* codes, Out* out, int64_t chunks) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (256 * kWideChunks) + threadIdx.x;
    uint4 eight[kWideChunks];
#pragma unroll
    for (int i = 0; i < kWideChunks; ++i)
        if (first + i * 256 < chunks) eight[i] = __ldcs(codes + first + i * 256);
#pragma unroll
    for (int i = 0; i < kWideChunks; ++i)
        if (first + i * 256 < chunks) store_wide(out + (first + i * 256) * kChunk, eight[i]);
}

template <typename Out, CodecKind kind>
void launch(const DecodeArgs& args, int device, cudaStream_t stream) {
    const int d = args.codec.d;
    if (d % kBlock == 0 && is_aligned(args.codes, 16) && is_aligned(args.scales, 8) && is_aligned(args.out, 16)) {
        const int64_t places = args.rows * (d / kBlock);
        const int grid = persistent_grid(decode_fast<Out, kind>, 256, 0, (places + 63) / 64, device);
        decode_fast<Out, kind><<<grid, 256, 0, stream>>>(args, places);
    } else {
        const size_t shared = sizeof(float) * d;
        allow_shared(decode_any<Out, kind>, shared, device);
        const int grid = persistent_grid(decode_any<Out, kind>, 256, shared, args.rows, device);
        decode_any<Out, kind><<<grid, 256, shared, stream>>>(args);
    }
}

template <typename Out>
void launch_widen(const DecodeArgs& args, int device, cudaStream_t stream) {
    const int64_t values = args.rows * args.codec.d, chunks = values / kChunk;
    constexpr int64_t per_cta = 256 * kWideChunks;
    Out* const out = static_cast<Out*>(args.out);
    const bool aligned = is_aligned(args.codes, 16) && is_aligned(out, 16);
    if (values % kChunk == 0 && aligned && chunks / per_cta < INT32_MAX) {
        const int grid = static_cast<int>((chunks + per_cta - 1) / per_cta);
        widen_fast<Out><<<grid, 256, 0, stream>>>(static_cast<const uint4*>(args.codes), out, chunks);
    } else {
        const int grid = persistent_grid(widen<Out>, 256, 0, (values + 255) / 256, device);
        widen<Out><<<grid, 256, 0, stream>>>(static_cast<const uint16_t*>(args.codes), out, values);
    }
}

template <typename Out>
void launch_kind(const DecodeArgs& args, int device, cudaStream_t stream) {
    switch (args.codec.kind) {
        case CodecKind::int8: launch<Out, CodecKind::int8>(args, device, stream); break;
        case CodecKind::int4: launch<Out, CodecKind::int4>(args, device, stream); break;
        case CodecKind::bf16: launch_widen<Out>(args, device, stream); break;
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
