// Rows of the residual stream -> codec bytes.
//
//     norm = sqrt(sum x^2)                 summed in float64
//     y    = (H x) / (norm / sqrt(d))      H: orthonormal Hadamard matrix on each block
//     scale, code                          see nla_engine/codec/rows.py, the contract for every bit
//
// This file: any width, and the choice between that and encode_fast.cu. Pointers and shapes: EncodeArgs in encode.hpp.
#include "encode.cuh"

namespace nla {
namespace {

// Any width, block and alignment: one CTA per row, the row in shared memory. Slow and plain.
// Dynamic shared memory: float[d] the row, uint32[scales] each group's largest magnitude as bits.
template <typename T, CodecKind kind>
__global__ void __launch_bounds__(256) encode_any(const EncodeArgs args) {
    extern __shared__ double shared[];
    __shared__ double partial[8];
    __shared__ float factor;
    __shared__ uint16_t* bits;  // where the row's bfloat16 bits go, if anywhere
    float* row = reinterpret_cast<float*>(shared);
    uint32_t* largest = reinterpret_cast<uint32_t*>(row + args.codec.d);
    const int d = args.codec.d, group = args.codec.group, groups = kind == CodecKind::bf16 ? 0 : d / group;

    for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x) {
        const int64_t dest = args.dest[r];
        if (dest < 0) continue;
        __syncthreads();  // all threads have finished the row before
        const T* x = static_cast<const T*>(args.hidden) + r * args.row_stride;
        double sum = 0.0;
        for (int i = threadIdx.x; i < d; i += blockDim.x) {
            row[i] = static_cast<float>(x[i]);
            sum = __fma_rn(static_cast<double>(row[i]), static_cast<double>(row[i]), sum);
        }
        for (int g = threadIdx.x; g < groups; g += blockDim.x) largest[g] = 0;
#pragma unroll
        for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 1; w < static_cast<int>(blockDim.x / 32); ++w) sum += partial[w];
            const RowState state = state_of(args, sum);
            args.norm[dest] = state.norm;
            factor = state.factor;
            bits = kind == CodecKind::bf16 ? static_cast<uint16_t*>(args.codes) + dest * d
                   : state.keep            ? take_exact(args, dest)
                                           : nullptr;
        }
        __syncthreads();

        if (bits) {
            for (int i = threadIdx.x; i < d; i += blockDim.x)
                bits[i] = static_cast<uint16_t>(bf16_bits(__float_as_uint(row[i])));
        }
        if constexpr (kind != CodecKind::bf16) {
            __syncthreads();
            rotate_shared(row, d, args.codec.block);
            for (int i = threadIdx.x; i < d; i += blockDim.x) {
                if (factor == 0.0f) row[i] = 0.0f;  // Inf * 0 is not 0
                atomicMax(&largest[i / group], __float_as_uint(fabsf(row[i])));  // magnitudes sort like their bits
            }
            __syncthreads();
            __half* const scales = static_cast<__half*>(args.scales) + dest * groups;
            for (int base = threadIdx.x & ~31; base < d; base += blockDim.x) {  // whole warps, because int4 shuffles
                const int i = base + (threadIdx.x & 31);
                const float v = i < d ? row[i] : 0.0f;
                const float range = i < d ? __fmul_rn(__uint_as_float(largest[i / group]), factor) : 0.0f;
                constexpr float top = kind == CodecKind::int8 ? 127.0f : 7.0f;
                Scale scale = make_scale(range, 1.0f / top);
                if constexpr (kind == CodecKind::int4) {
                    const float reciprocal = fine_reciprocal(whole_reciprocal(scale, factor));
                    const int fine = static_cast<int>(__fsub_rn(shifted_code(v, reciprocal), kRounder));
                    int sums[kDivisors];
                    for (int k = 0; k < kDivisors; ++k) {
                        const int distance = static_cast<int8_t>((16 * (kFirstDivisor + k) * fine + 128) >> 8);
                        sums[k] = distance * distance;
                        for (int step = group / 2; step; step /= 2) sums[k] += __shfl_xor_sync(kAll, sums[k], step);
                    }
                    if (!scale.is_subnormal()) scale = cheapest_scale(sums, range);
                }
                const float whole = __fsub_rn(shifted_code(v, whole_reciprocal(scale, factor)), kRounder);
                const int code = static_cast<int>(fminf(fmaxf(whole, -top), top));
                if (i < d && i % group == 0) scales[i / group] = scale.half;
                if constexpr (kind == CodecKind::int8) {
                    if (i < d) static_cast<int8_t*>(args.codes)[dest * d + i] = static_cast<int8_t>(code);
                } else {
                    const int odd = __shfl_down_sync(kAll, code, 1);
                    if (i < d && i % 2 == 0)
                        static_cast<uint8_t*>(args.codes)[dest * (d / 2) + i / 2] =
                            static_cast<uint8_t>((code + 8) | (odd + 8) << 4);
                }
            }
        }
    }
}

template <typename T, CodecKind kind>
void launch_any(const EncodeArgs& args, int device, cudaStream_t stream) {
    const size_t shared = sizeof(float) * (size_t(args.codec.d) + args.codec.scales());
    allow_shared(encode_any<T, kind>, shared, device);
    const int grid = persistent_grid(encode_any<T, kind>, 256, shared, args.rows, device);
    encode_any<T, kind><<<grid, 256, shared, stream>>>(args);
}

template <typename T>
void launch(const EncodeArgs& args, int device, cudaStream_t stream) {
    if (!launch_fast<T>(args, device, stream)) {
        switch (args.codec.kind) {
            case CodecKind::bf16: launch_any<T, CodecKind::bf16>(args, device, stream); break;
            case CodecKind::int8: launch_any<T, CodecKind::int8>(args, device, stream); break;
            case CodecKind::int4: launch_any<T, CodecKind::int4>(args, device, stream); break;
        }
    }
    cuda_check(cudaGetLastError(), "encode_rows");
}

}  // namespace

void encode_rows(int device, uintptr_t stream, EncodeArgs args) {
    check_codec(args.codec);
    check(args.rows >= 0 && args.rows <= INT32_MAX, "rows", "is not an int32");
    if (args.rows == 0) return;
    check(args.row_stride >= args.codec.d || args.rows == 1, "row_stride", "is less than d");
    check(args.exact_capacity >= 0 && args.exact_capacity <= INT32_MAX, "exact_capacity", "is not an int32");
    check_pointer(args.hidden, "hidden");
    check_pointer(args.dest, "dest");
    check_pointer(args.codes, "codes");
    check_pointer(args.norm, "norm");
    if (args.codec.kind != CodecKind::bf16) {
        check_pointer(args.scales, "scales");
        check_pointer(args.exact_count, "exact_count");
        if (args.exact_capacity > 0) {
            check_pointer(args.exact, "exact");
            check_pointer(args.exact_dest, "exact_dest");
        }
    }
    args.sqrt_d = float_sqrt(args.codec.d);
    args.unit = float_unit(args.codec.block);
    const OnDevice current(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    switch (args.input) {
        case FloatKind::float32: return launch<float>(args, device, cuda_stream);
        case FloatKind::bfloat16: return launch<__nv_bfloat16>(args, device, cuda_stream);
        case FloatKind::float16: return launch<__half>(args, device, cuda_stream);
    }
}

}  // namespace nla
