// Rows of the residual stream -> codec bytes, each row read from global memory once.
//
//     norm = sqrt(sum x^2)                 summed in float64
//     y    = (H x) / (norm / sqrt(d))      H: orthonormal Hadamard matrix on each block
//     scale, code                          see nla_engine/codec.py, the contract for every bit
//
// Codecs bf16 and int4, and int8 where encode_int8.cu does not serve.
// Pointers and shapes: EncodeArgs in encode.hpp. The layout of a row over threads: rows.cuh.
#include "encode.cuh"

namespace nla {
namespace {

constexpr int kClips = 6;
__constant__ float clips[kClips] = {1.0f, 0.92f, 0.84f, 0.76f, 0.68f, 0.6f};  // codec.INT4_CLIPS

// Squared error of value i at a scale. Signs fall out of a square; code (3 bits) * scale (11 bits) is exact, so the
// fused operation rounds once, as the subtraction of the product does.
__device__ __forceinline__ float int4_error(float v, const Scale& scale) {
    const float code = fminf(__fmul_rn(fabsf(v), scale.reciprocal), 7.0f);
    const float whole = __fsub_rn(__fadd_rn(code, kRounder), kRounder);
    const float delta = __fmaf_rn(-whole, scale.value, fabsf(v));
    return __fmul_rn(delta, delta);
}

// Sum over errors i, i + width, i + 2 width ... in the order of a butterfly reduction: steps 16, 8, 4, 2, 1.
template <int width>
__device__ __forceinline__ float int4_error_sum(const float (&v)[kPerLane], int i, const Scale& scale) {
    if constexpr (width == kPerLane) {
        return int4_error(v[i], scale);
    } else {
        return __fadd_rn(int4_error_sum<2 * width>(v, i, scale), int4_error_sum<2 * width>(v, i + width, scale));
    }
}

// One group to a lane.
__device__ __forceinline__ void store_int4(const EncodeArgs& args, float (&v)[kPerLane], int64_t dest, int quad, int sub) {
    if (dest < 0) return;
    const float largest = largest_in_lane(v);
    Scale best = make_scale(largest, 1.0f / 7.0f);
    float best_error = int4_error_sum<1>(v, 0, best);
#pragma unroll 1
    for (int c = 1; c < kClips; ++c) {
        const Scale scale = make_scale(__fmul_rn(largest, clips[c]), 1.0f / 7.0f);
        // A rounded sum of squares is no less than any of them: if what is cut off the largest value costs too much
        // alone, the sum does.
        if (int4_error(largest, scale) >= best_error) continue;
        const float error = int4_error_sum<1>(v, 0, scale);
        if (error < best_error) {
            best_error = error;
            best = scale;
        }
    }
    uint32_t word[kPerLane / 8];
#pragma unroll
    for (int i = 0; i < kPerLane / 8; ++i) {
        word[i] = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float code = clamp(__fmul_rn(v[8 * i + k], best.reciprocal), 7.0f);
            word[i] |= (__float_as_uint(__fadd_rn(code, kRounder)) & 15u) << (4 * k);
        }
        word[i] ^= 0x88888888u;  // two's complement + 8
    }
    uint8_t* codes = static_cast<uint8_t*>(args.codes) + dest * (args.codec.d / 2) + quad * (kBlock / 2) + sub * 16;
    *reinterpret_cast<uint4*>(codes) = {word[0], word[1], word[2], word[3]};
    static_cast<__half*>(args.scales)[dest * (args.codec.d / 32) + quad * 4 + sub] = best.half;
}

// Half-width input leaves registers free to load the next rows before working at those in hand, without spilling.
template <typename T, CodecKind kind>
constexpr bool loads_ahead = sizeof(T) == 2 && kind != CodecKind::int4;

// A cap, so that three CTAs of 224 threads (d 3584) share a multiprocessor; 16384 registers to a quarter of it, so 88
// would be two. int4 computes more than it waits: two.
template <typename T, CodecKind kind>
constexpr int fast_registers = kind == CodecKind::int4 ? 112 : 80;

// Codecs bf16 and int4, blocks of 128, 16-byte accesses. A CTA works at `rows_per_cta` rows side by side, a quad of lanes
// per block. Dynamic shared memory: double[rows * quads], RowState[rows_per_cta].
template <typename T, CodecKind kind>
__global__ void __maxnreg__((fast_registers<T, kind>)) encode_fast(const EncodeArgs args, int rows_per_cta, int quads) {
    constexpr Layout layout = kind == CodecKind::int4 ? Layout::Packed : Layout::Spread;
    extern __shared__ double partial[];
    RowState* states = reinterpret_cast<RowState*>(partial + rows_per_cta * quads);

    const int sub = threadIdx.x & 3, lane_id = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int place = threadIdx.x / 4;  // of this quad in the CTA
    const bool works = place < rows_per_cta * quads;
    const int row_in_cta = works ? place / quads : 0, quad = works ? place % quads : 0;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * rows_per_cta;

    int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_cta;
    Lane<T> next;
    int64_t next_dest = -1;
    const auto load = [&](int64_t row) {
        next_dest = works ? dest_of(args, row) : -1;
        next = load_lane<T, layout>(args, row, quad, sub, next_dest >= 0);
    };
    if constexpr (loads_ahead<T, kind>) load(first + row_in_cta);
    for (; first < args.rows; first += stride) {
        if constexpr (!loads_ahead<T, kind>) load(first + row_in_cta);
        const Lane<T> lane = next;
        const int64_t dest = next_dest;
        if constexpr (loads_ahead<T, kind>) load(first + stride + row_in_cta);

        const double sum = sum_of_squares(lane);
        if (works && sub == 0) partial[place] = sum;
        if (!__syncthreads_or(dest >= 0)) continue;  // none of these rows was selected

        find_states(args, first, rows_per_cta, quads, partial, states, warp, warps, lane_id);
        __syncthreads();

        if constexpr (kind == CodecKind::bf16) {
            if (dest >= 0)
                store_bf16<T, layout>(lane, static_cast<uint16_t*>(args.codes) + dest * args.codec.d, quad, sub);
        } else {
            const RowState state = dest >= 0 ? states[row_in_cta] : RowState{0.0f, 0.0f, -1};
            if (state.exact_slot >= 0)
                store_bf16<T, layout>(lane, args.exact + static_cast<int64_t>(state.exact_slot) * args.codec.d, quad, sub);
            float v[kPerLane];
#pragma unroll
            for (int c = 0; c < 4; ++c) unpack(lane.chunk[c], v + c * kChunk);
            rotate<layout>(v, sub);
#pragma unroll
            for (int i = 0; i < kPerLane; ++i)  // Inf * 0 is not 0
                v[i] = state.factor == 0.0f ? 0.0f : __fmul_rn(v[i], state.factor);
            store_int4(args, v, dest, quad, sub);
        }
    }
}

// Any width, block and alignment: a CTA a row, the row in shared memory. Slow and plain.
// Dynamic shared memory: float[d] the row, uint32[scales] each group's largest magnitude as bits.
template <typename T, CodecKind kind>
__global__ void __launch_bounds__(256) encode_any(const EncodeArgs args) {
    extern __shared__ double shared[];
    __shared__ double partial[8];
    __shared__ RowState state;
    float* row = reinterpret_cast<float*>(shared);
    uint32_t* largest = reinterpret_cast<uint32_t*>(row + args.codec.d);
    const int d = args.codec.d, group = args.codec.group, groups = kind == CodecKind::bf16 ? 0 : d / group;

    for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x) {
        const int64_t dest = args.dest[r];
        if (dest < 0) continue;
        __syncthreads();  // the row before is done with
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
            state = row_state(args, sum, dest);
        }
        __syncthreads();

        uint16_t* const exact = kind == CodecKind::bf16  ? static_cast<uint16_t*>(args.codes) + dest * d
                                : state.exact_slot >= 0 ? args.exact + static_cast<int64_t>(state.exact_slot) * d
                                                        : nullptr;
        for (int i = threadIdx.x; i < d; i += blockDim.x) {
            if (exact) exact[i] = static_cast<uint16_t>(bf16_bits(__float_as_uint(row[i])));
        }
        if constexpr (kind != CodecKind::bf16) {
            __syncthreads();
            rotate_shared(row, d, args.codec.block);
            for (int i = threadIdx.x; i < d; i += blockDim.x) {
                row[i] = state.factor == 0.0f ? 0.0f : __fmul_rn(row[i], state.factor);  // Inf * 0 is not 0
                atomicMax(&largest[i / group], __float_as_uint(fabsf(row[i])));  // magnitudes order as their bits
            }
            __syncthreads();
            __half* const scales = static_cast<__half*>(args.scales) + dest * groups;
            for (int base = threadIdx.x & ~31; base < d; base += blockDim.x) {  // whole warps: int4 shuffles
                const int i = base + (threadIdx.x & 31);
                const float v = i < d ? row[i] : 0.0f;
                const float range = i < d ? __uint_as_float(largest[i / group]) : 0.0f;
                constexpr float top = kind == CodecKind::int8 ? 127.0f : 7.0f;
                Scale best = make_scale(range, 1.0f / top);
                if constexpr (kind == CodecKind::int4) {
                    float best_error = INFINITY;
                    for (int c = 0; c < kClips; ++c) {
                        const Scale scale = make_scale(__fmul_rn(range, clips[c]), 1.0f / top);
                        float error = int4_error(v, scale);
                        for (int step = group / 2; step; step /= 2)
                            error = __fadd_rn(error, __shfl_xor_sync(kAll, error, step));
                        if (error < best_error) {
                            best_error = error;
                            best = scale;
                        }
                    }
                }
                const int code = __float2int_rn(clamp(__fmul_rn(v, best.reciprocal), top));
                if (i < d && i % group == 0) scales[i / group] = best.half;
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
void launch(const EncodeArgs& args, int device, cudaStream_t stream) {
    const int d = args.codec.d;
    const bool fast = d % kBlock == 0 && d <= kBlock * 128 && (args.row_stride * sizeof(T)) % 16 == 0 &&
                      is_aligned(args.hidden, 16) && is_aligned(args.codes, 16) &&
                      (args.exact_capacity == 0 || is_aligned(args.exact, 16));
    if (!fast || (kind == CodecKind::int8 && sizeof(T) == 4)) {
        const size_t shared = sizeof(float) * (size_t(d) + args.codec.scales());
        allow_shared(encode_any<T, kind>, shared, device);
        const int grid = persistent_grid(encode_any<T, kind>, 256, shared, args.rows, device);
        encode_any<T, kind><<<grid, 256, shared, stream>>>(args);
    } else if constexpr (kind != CodecKind::int8) {
        const Tiling tile = tiling(d);
        const size_t shared = tile.rows * (tile.quads * sizeof(double) + sizeof(RowState));
        const int64_t pieces = (args.rows + tile.rows - 1) / tile.rows;
        const int grid = persistent_grid(encode_fast<T, kind>, tile.threads, shared, pieces, device);
        encode_fast<T, kind><<<grid, tile.threads, shared, stream>>>(args, tile.rows, tile.quads);
    } else if constexpr (sizeof(T) == 2) {
        launch_int8<T>(args, device, stream);
    }
    cuda_check(cudaGetLastError(), "encode_rows");
}

template <typename T>
void launch_kind(const EncodeArgs& args, int device, cudaStream_t stream) {
    switch (args.codec.kind) {
        case CodecKind::bf16: return launch<T, CodecKind::bf16>(args, device, stream);
        case CodecKind::int8: return launch<T, CodecKind::int8>(args, device, stream);
        case CodecKind::int4: return launch<T, CodecKind::int4>(args, device, stream);
    }
}

}  // namespace

void encode_rows(int device, uintptr_t stream, EncodeArgs args) {
    check_codec(args.codec);
    check(args.rows >= 0, "rows", "is negative");
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
        case FloatKind::float32: return launch_kind<float>(args, device, cuda_stream);
        case FloatKind::bfloat16: return launch_kind<__nv_bfloat16>(args, device, cuda_stream);
        case FloatKind::float16: return launch_kind<__half>(args, device, cuda_stream);
    }
}

}  // namespace nla
