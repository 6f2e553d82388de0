// Rows of 16-bit floats -> int8 codes, the codec that runs by default, where blocks are of 128 and accesses of 16 bytes.
//
// Four of the seven steps of the rotation are products with the Hadamard matrix of order 16 on the tensor cores, whose
// factors, the row and +-1, are exact. What they sum is rounded by the hardware, and in an order of its own: a code may
// be one off that of codec.py where the float32 sums of a block are not exact and v / scale is within 2^-16 of a tie.
//
// A quad of lanes owns one block of two rows, in layout Spread (rows.cuh): rows g and g + 8 of a fragment, g being the
// quad of the warp. Channel bits 0, 1 (a lane's words) and 3, 4 (the lane) are the four bits of the product's inner and
// outer index, so what goes in and what comes out lie alike; bits 2, 5 and 6 stay within a lane.
#include <type_traits>

#include "encode.cuh"

namespace nla {
namespace {

constexpr int kRows = 2;  // of a quad
constexpr float kSmallestNormalHalf = 6.103515625e-05f;

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

// The matrix of order 16 as this lane's part of the second factor: b[half][pair] holds rows k, k + 1 of column n, with
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
};

// v[row] = sqrt(128) H x for the quad's block of both rows, each lane its 32 channels. All lanes of the warp call.
template <typename T>
__device__ __forceinline__ void rotate_two(const Lane<T> (&lane)[kRows], const Hadamard<T>& matrix, float (&v)[kRows][kPerLane]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const uint32_t* words[kRows] = {&lane[0].chunk[c].part[0].x, &lane[1].chunk[c].part[0].x};
#pragma unroll
        for (int bit2 = 0; bit2 < 2; ++bit2) {
            const uint32_t a[4] = {words[0][2 * bit2], words[1][2 * bit2], words[0][2 * bit2 + 1], words[1][2 * bit2 + 1]};
#pragma unroll
            for (int bit1 = 0; bit1 < 2; ++bit1) {
                float out[4];
                multiply(out, a, matrix.b[bit1], T{});
                const int at = c * kChunk + 4 * bit2 + 2 * bit1;
                v[0][at] = out[0];
                v[0][at + 1] = out[1];
                v[1][at] = out[2];
                v[1][at + 1] = out[3];
            }
        }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        butterfly_in_lane<4>(v[row]);
        butterfly_in_lane<8>(v[row]);
        butterfly_in_lane<16>(v[row]);
    }
}

// One scale a block. A normal scale is within 2^-11 of largest / 127, so rounding alone keeps codes within +-127.
__device__ __forceinline__ void store(const EncodeArgs& args, float (&v)[kPerLane], float largest, float factor,
                                      int64_t dest, int quad, int sub) {
    if (factor == 0.0f) {  // Inf * 0 is not 0: such rows get zero codes
        largest = 0.0f;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) v[i] = 0.0f;
    }
    // Rounding keeps order, so this is the largest of the products.
    const Scale scale = make_scale(__fmul_rn(largest, factor), 1.0f / 127.0f);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], factor), scale.reciprocal);
    if (scale.value < kSmallestNormalHalf) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) v[i] = clamp(v[i], 127.0f);
    }
    uint32_t word[kPerLane / 4];
#pragma unroll
    for (int i = 0; i < kPerLane / 4; ++i) {
        uint32_t bits[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) bits[k] = __float_as_uint(__fadd_rn(v[4 * i + k], kRounder));
        word[i] = __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
    }
    int8_t* codes = static_cast<int8_t*>(args.codes) + dest * args.codec.d + quad * kBlock;
#pragma unroll
    for (int c = 0; c < 4; ++c)
        *reinterpret_cast<uint2*>(codes + chunk_of<Layout::Spread>(sub, c) * kChunk) = {word[2 * c], word[2 * c + 1]};
    if (sub == 0) static_cast<__half*>(args.scales)[dest * (args.codec.d / kBlock) + quad] = scale.half;
}

// A CTA works at `pairs` pairs of rows side by side. Dynamic shared memory: double[2 pairs * quads], RowState[2 pairs].
template <typename T>
__global__ void __launch_bounds__(256, 2) encode_int8(const EncodeArgs args, int pairs, int quads) {
    extern __shared__ double partial[];
    const int rows_per_cta = kRows * pairs;
    RowState* states = reinterpret_cast<RowState*>(partial + rows_per_cta * quads);

    const int sub = threadIdx.x & 3, lane_id = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int place = threadIdx.x / 4;  // of this quad in the CTA
    const bool works = place < pairs * quads;
    const int row_in_cta = works ? place / quads * kRows : 0, quad = works ? place % quads : 0;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * rows_per_cta;
    const Hadamard<T> matrix(lane_id);

    int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_cta;
    Lane<T> next[kRows];
    bool next_chosen[kRows];
    const auto load = [&](int64_t row) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            next_chosen[r] = works && dest_of(args, row + row_in_cta + r) >= 0;
            next[r] = load_lane<T, Layout::Spread>(args, row + row_in_cta + r, quad, sub, next_chosen[r]);
        }
    };
    load(first);
    for (; first < args.rows; first += stride) {
        const Lane<T> lane[kRows] = {next[0], next[1]};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const double sum = sum_of_squares(lane[r]);
            if (works && sub == 0) partial[(row_in_cta + r) * quads + quad] = sum;
        }
        const bool chosen[kRows] = {next_chosen[0], next_chosen[1]};
        if (!__syncthreads_or(chosen[0] || chosen[1])) {  // none of these rows was selected
            load(first + stride);
            continue;
        }
        find_states(args, first, rows_per_cta, quads, partial, states, warp, warps, lane_id);

        float v[kRows][kPerLane], largest[kRows];
        rotate_two(lane, matrix, v);
        load(first + stride);  // into the registers that these rows no longer need
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            largest[r] = largest_in_lane(v[r]);
            largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAll, largest[r], 1));
            largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAll, largest[r], 2));
        }
        __syncthreads();

#pragma unroll
        for (int r = 0; r < kRows; ++r)
            if (chosen[r])
                store(args, v[r], largest[r], states[row_in_cta + r].factor,
                      dest_of(args, first + row_in_cta + r), quad, sub);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (!chosen[r]) continue;
            const int slot = states[row_in_cta + r].exact_slot;
            if (slot < 0) continue;
            const Lane<T> again = load_lane<T, Layout::Spread>(args, first + row_in_cta + r, quad, sub, true);
            store_bf16<T, Layout::Spread>(again, args.exact + static_cast<int64_t>(slot) * args.codec.d, quad, sub);
        }
    }
}

}  // namespace

template <typename T>
void launch_int8(const EncodeArgs& args, int device, cudaStream_t stream) {
    const Tiling tile = tiling(args.codec.d);
    const int rows_per_cta = kRows * tile.rows;
    const size_t shared = rows_per_cta * (tile.quads * sizeof(double) + sizeof(RowState));
    const int64_t pieces = (args.rows + rows_per_cta - 1) / rows_per_cta;
    const int grid = persistent_grid(encode_int8<T>, tile.threads, shared, pieces, device);
    encode_int8<T><<<grid, tile.threads, shared, stream>>>(args, tile.rows, tile.quads);
}

template void launch_int8<__nv_bfloat16>(const EncodeArgs&, int, cudaStream_t);
template void launch_int8<__half>(const EncodeArgs&, int, cudaStream_t);

}  // namespace nla
