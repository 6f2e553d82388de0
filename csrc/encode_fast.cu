// Rows -> codec bytes for blocks of 128 and accesses of 16 bytes.
//
// Many rows: one warp per row; no warp waits for another. Lanes copy chunks (rows.cuh) to shared memory and square them.
// When the warp knows the norm, it encodes eight blocks at a time, a quad of lanes per block, and copies the blocks of
// its next row into their place. Except for squares and int4, a lane reads there only what it has written itself. If at
// most four blocks of a row are left over, they wait for those of the next row (staged_row.cuh).
//
// Few rows, as in a decode step: one CTA per row, one warp per eight blocks, so a row takes the time of eight blocks.
#include "encode_pass.cuh"
#include "staged_row.cuh"

namespace nla {
namespace {

constexpr int kWarps = 4;                // per CTA with many rows, or fewer if they do not fit
constexpr int kResident = 6;             // such CTAs on a multiprocessor, if their rows fit
constexpr int kFewRows = 16;             // per multiprocessor: up to this many rows, each has its own CTA
constexpr int kMostPasses = 16;          // of such a row
constexpr size_t kShared = 48 << 10;     // bytes that a CTA has without asking for more

// ---- many rows: one warp per row, one after the other ----

// Calls f(dest, next, half) for each row of the warp that is not skipped, once it is in `staged` at `half`. next: the
// row to copy after it, or null. Returns the half of the row that would follow.
template <typename T, Layout layout, typename F>
__device__ __forceinline__ int for_each_row(const EncodeArgs& args, const StagedRow<T, layout>& staged, F f) {
    const uint32_t warps = blockDim.x / 32, stride = gridDim.x * warps;
    const auto at = [&](uint32_t row) { return static_cast<const T*>(args.hidden) + row * args.row_stride; };

    uint32_t row = blockIdx.x * warps + threadIdx.x / 32;
    int64_t next_dest = dest_of(args, row);
    bool copied = false;  // whether this row is in shared memory, or being copied there
    int half = 0;
    for (; row < args.rows; row += stride) {
        const int64_t dest = next_dest;
        next_dest = dest_of(args, row + stride);  // loaded meanwhile
        if (dest < 0) continue;
        if (!copied) {
#pragma unroll 1
            for (int pass = 0; pass < staged.passes(); ++pass) staged.copy(at(row), pass, half);
        }
        staged.wait();
        copied = next_dest >= 0;  // the next row replaces what has been read of this one
        f(dest, copied ? at(row + stride) : nullptr, half);
        half ^= staged.shares();
    }
    return half;
}

// Dynamic shared memory of the next two kernels: uint4[warps, StagedRow::pieces].

// bf16: each chunk is read once.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps, kResident) encode_bits(const EncodeArgs args) {
    constexpr Layout layout = layout_of<CodecKind::bf16>;
    extern __shared__ uint4 shared[];
    const StagedRow<T, layout> staged(shared, args.codec.d);

    for_each_row(args, staged, [&](int64_t dest, const T* next, int half) {
        uint16_t* const bits = static_cast<uint16_t*>(args.codes) + dest * args.codec.d;
        Squares squares;
#pragma unroll 1
        for (int pass = 0; pass < staged.passes(); ++pass) {
            if (staged.works(pass, half)) {
                uint4* const to = reinterpret_cast<uint4*>(bits + staged.channel(pass));
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const Chunk<T> chunk = staged.chunk(pass, c);
                    to[c * kChunkStep<layout>] = bf16_chunk(chunk);
                    squares.add(chunk, c);
                }
            }
            if (next) staged.copy(next, pass, half ^ staged.shares());
        }
        const RowState state = state_of(args, squares.total());
        if (threadIdx.x % 32 == 0) args.norm[dest] = state.norm;
    });
}

// int8, int4.
template <typename T, CodecKind kind>
__global__ void __launch_bounds__(32 * kWarps, kResident) encode_codes(const EncodeArgs args) {
    extern __shared__ uint4 shared[];
    const int d = args.codec.d, lane = threadIdx.x % 32;
    const StagedRow<T, layout_of<kind>> staged(shared, d);
    const Rotation<T, kind> rotation(lane);

    // A pass over staged blocks. at: as in store_codes.
    const auto encode = [&](int pass, int64_t at, float factor, const T* next, int next_half) {
        const Chunk<T> x[4] = {staged.chunk(pass, 0), staged.chunk(pass, 1), staged.chunk(pass, 2),
                               staged.chunk(pass, 3)};
        float v[kPerLane];
        rotation.apply(x, v);
        staged.release();
        if (next) staged.copy(next, pass, next_half);
        store_codes<kind>(args, v, factor, at);
    };

    int64_t rest_at = -1;  // of the row whose share of a shared pass this lane holds
    float rest_factor = 0.0f;
    const int half = for_each_row(args, staged, [&](int64_t dest, const T* next, int half) {
        Squares squares;
#pragma unroll 2
        for (int pass = 0; pass < staged.whole(); ++pass) {
            if (!staged.works(pass, half)) continue;
#pragma unroll
            for (int c = 0; c < 4; ++c) squares.add(staged.chunk(pass, c), c);
        }
        if (staged.shares() && staged.shared_works()) {
#pragma unroll
            for (int i = 0; i < 2; ++i) squares.add(staged.shared_chunk(half, i), i);
        }
        const RowState state = state_of(args, squares.total());
        if (lane == 0) args.norm[dest] = state.norm;
        if (state.keep) {
            const uint64_t address = lane == 0 ? reinterpret_cast<uint64_t>(take_exact(args, dest)) : 0;
            uint16_t* const bits = reinterpret_cast<uint16_t*>(__shfl_sync(kAll, address, 0));
#pragma unroll 1
            for (int pass = 0; bits && pass < staged.passes(); ++pass) {
                if (!staged.works(pass, half)) continue;
                uint4* const to = reinterpret_cast<uint4*>(bits + staged.channel(pass));
#pragma unroll
                for (int c = 0; c < 4; ++c) to[c * kChunkStep<layout_of<kind>>] = bf16_chunk(staged.chunk(pass, c));
            }
        }

        // A row's share of a shared pass waits for the share of the next row.
        const int next_half = half ^ staged.shares();
        const int64_t first = dest * d;
        if (staged.shares() && staged.works(staged.whole(), half)) {
            rest_at = first + staged.channel(staged.whole());
            rest_factor = state.factor;
        }
        int pass = 0;
#pragma unroll 1
        for (; pass < staged.whole() + half; ++pass) {
            const bool shared = pass == staged.whole();
            const int64_t at = staged.works(pass, half) ? first + staged.channel(pass) : -1;
            encode(pass, shared ? rest_at : at, shared ? rest_factor : state.factor, next, next_half);
        }
        if (half) rest_at = -1;
        if (next && pass < staged.passes()) staged.copy(next, pass, next_half);
    });
    if (half) encode(staged.whole(), rest_at, rest_factor, nullptr, 0);
}

// ---- few rows: one CTA per row, one warp per pass ----

template <typename T, CodecKind kind>
__global__ void __launch_bounds__(32 * kMostPasses) encode_few(const EncodeArgs args) {
    constexpr int kStep = kChunkStep<layout_of<kind>>;
    __shared__ double sums[kMostPasses];
    __shared__ uint16_t* kept;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t dest = args.dest[blockIdx.x];
    if (dest < 0) return;
    const int channel = (warp * kQuads + lane / 4) * kBlock + chunk_of<layout_of<kind>>(lane % 4, 0) * kChunk;
    const bool works = channel < args.codec.d;
    const int64_t at = dest * args.codec.d + channel;

    Chunk<T> x[4] = {};
    if (works) {
        const T* const row = static_cast<const T*>(args.hidden) + blockIdx.x * args.row_stride;
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] = reinterpret_cast<const Chunk<T>*>(row + channel)[c * kStep];
    }
    Squares squares;
#pragma unroll
    for (int c = 0; c < 4; ++c) squares.add(x[c], c);
    double sum = squares.total();
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    sum = 0.0;
    for (int w = 0; w < warps; ++w) sum += sums[w];
    const RowState state = state_of(args, sum);
    uint16_t* bits = nullptr;  // where the bits of the lane's first channel go, if anywhere
    if (kind == CodecKind::bf16) bits = static_cast<uint16_t*>(args.codes) + at;
    if (threadIdx.x == 0) args.norm[dest] = state.norm;
    if (state.keep) {
        if (threadIdx.x == 0) kept = take_exact(args, dest);
        __syncthreads();
        bits = kept ? kept + channel : nullptr;
    }
    if (bits && works) {
#pragma unroll
        for (int c = 0; c < 4; ++c) reinterpret_cast<uint4*>(bits)[c * kStep] = bf16_chunk(x[c]);
    }
    if constexpr (kind != CodecKind::bf16) {
        float v[kPerLane];
        Rotation<T, kind>(lane).apply(x, v);
        store_codes<kind>(args, v, state.factor, works ? at : -1);
    }
}

// ---- host side ----

template <typename Kernel>
void launch_many(Kernel kernel, const EncodeArgs& args, size_t row_bytes, int device, cudaStream_t stream) {
    const int warps = static_cast<int>(std::min<size_t>(kWarps, kShared / row_bytes));
    const size_t shared = warps * row_bytes;
    const int grid = persistent_grid(kernel, 32 * warps, shared, (args.rows + warps - 1) / warps, device);
    kernel<<<grid, 32 * warps, shared, stream>>>(args);
}

// False if a row does not fit.
template <typename T, CodecKind kind>
bool launch(const EncodeArgs& args, int device, cudaStream_t stream) {
    using Staged = StagedRow<T, layout_of<kind>>;
    const int passes = Staged::passes(args.codec.d);
    const size_t row_bytes = sizeof(uint4) * Staged::pieces(args.codec.d);
    if (row_bytes > kShared) return false;
    if (args.rows <= kFewRows * processors(device) && passes <= kMostPasses) {
        encode_few<T, kind><<<static_cast<int>(args.rows), 32 * passes, 0, stream>>>(args);
    } else if constexpr (kind == CodecKind::bf16) {
        launch_many(encode_bits<T>, args, row_bytes, device, stream);
    } else {
        launch_many(encode_codes<T, kind>, args, row_bytes, device, stream);
    }
    return true;
}

}  // namespace

template <typename T>
bool launch_fast(const EncodeArgs& args, int device, cudaStream_t stream) {
    const bool fits = args.codec.d % kBlock == 0 && (args.row_stride * sizeof(T)) % 16 == 0 &&
                      is_aligned(args.hidden, 16) && is_aligned(args.codes, 16) &&
                      (args.exact_capacity == 0 || is_aligned(args.exact, 16));
    if (!fits) return false;
    switch (args.codec.kind) {
        case CodecKind::bf16: return launch<T, CodecKind::bf16>(args, device, stream);
        case CodecKind::int8: return launch<T, CodecKind::int8>(args, device, stream);
        case CodecKind::int4: return launch<T, CodecKind::int4>(args, device, stream);
    }
    return false;
}

template bool launch_fast<float>(const EncodeArgs&, int, cudaStream_t);
template bool launch_fast<__nv_bfloat16>(const EncodeArgs&, int, cudaStream_t);
template bool launch_fast<__half>(const EncodeArgs&, int, cudaStream_t);

}  // namespace nla
