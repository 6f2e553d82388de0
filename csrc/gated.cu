// act(x Wg^T) * (x Wu^T) in one launch: contract in gated.hpp, instructions in wgmma.cuh.
//
// Persistent CTAs, one per multiprocessor. A thread of the first warpgroup, the producer, copies tiles of x and w into
// a ring of stages (64 channels each). The other warpgroups, the consumers, multiply 64 rows each. The tile of w in a
// stage is `width` gate rows and below them `width` up rows. So one wgmma computes both, and gate and up of a result
// are in one thread. While the consumers round and store a tile, the producer fills the ring for the next one.
//
// The width decides how full the last wave is: 4 x 148 tiles of 128 columns (m = 512, n = 18944) are 4.5 waves on 132
// multiprocessors and take 5; with 96 columns they are 6.0 waves, each of three quarters the time.
#include "gated.hpp"

#include <stdexcept>
#include <string>

#include "device.cuh"
#include "wgmma.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "gated.cu is for sm_90a only: only Hopper has its instructions, not later cards"
#endif

namespace nla {
namespace {

constexpr int kDepth = 64;                  // channels of a stage: 128 bytes, the swizzle's span
constexpr int kGroupRows = 2048;            // rows of x that stay in L2 while all of w is read
constexpr int kShared = 227 * 1024 - 2048;  // bytes for stages and output; the rest for barriers and alignment
constexpr int kMaxStages = 8;
// L2 policies, as createpolicy makes them. Rows are read again for every tile of w, weights seldom.
constexpr uint64_t kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000;

// The sizes of a kernel, which all follow from its tile.
template <int rows, int width>
struct Sizes {
    static constexpr int kConsumers = rows / 64;  // warpgroups
    static constexpr int kThreads = 128 * (1 + kConsumers);
    static constexpr int kXBytes = rows * kDepth * 2;
    static constexpr int kHalfBytes = width * kDepth * 2;  // of w: gate or up
    static constexpr int kStageBytes = kXBytes + 2 * kHalfBytes;
    static constexpr int kOutBytes = rows * width * 2;
    static constexpr int kFit = (kShared - kOutBytes) / kStageBytes;
    static constexpr int kStages = kFit < kMaxStages ? kFit : kMaxStages;
    static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kOutBytes + 2 * 8 * kStages;
    // The output is stored in boxes of 64 rows by kBox columns. They are swizzled if the width is a multiple of 32.
    // Otherwise their rows have an odd number of 16-byte chunks, which avoids bank conflicts.
    static constexpr int kBox = width % 64 == 0 ? 64 : width % 32 == 0 ? 32 : width % 16 == 0 ? width / 2 : width;
    static constexpr CUtensorMapSwizzle kBoxSwizzle = kBox == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                                      : kBox == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                   : CU_TENSOR_MAP_SWIZZLE_NONE;

    static_assert(rows % 64 == 0 && width % 8 == 0 && width % kBox == 0 && kStages >= 3);
    static_assert(kBox == 64 || kBox == 32 || kBox / 8 % 2 == 1);
    static_assert(64 * kBox * 2 % (kBox == 64 ? 1024 : kBox == 32 ? 512 : 128) == 0);
    static_assert(kXBytes % 1024 == 0 && kHalfBytes % 1024 == 0);

    // Where 8 columns of one of the warpgroup's 64 rows go in its part of the output buffer.
    __device__ static __forceinline__ uint32_t out_place(int row, int eight) {
        constexpr int kEights = kBox / 8;
        const int box = eight / kEights, in_box = eight % kEights;
        const int chunk = kBox == 64 ? in_box ^ (row & 7) : kBox == 32 ? in_box ^ (row >> 1 & 3) : in_box;
        return box * (64 * kBox * 2) + row * (kBox * 2) + chunk * 16;
    }
};

struct Maps {
    CUtensorMap x, w, out;
};

struct Work {
    int n, k_steps;        // columns of the output; stages per tile
    int tiles_m, tiles_n;
    int group;             // tiles of rows that are computed together, see kGroupRows
    bool silu;
    uint64_t x_policy, w_policy;
};

// First row and column of a tile. Within a group, tiles are numbered down the rows first.
template <int rows, int width>
__device__ __forceinline__ int2 tile_origin(const Work& work, int tile) {
    const int in_group = work.group * work.tiles_n;
    const int first = tile / in_group * work.group, rest = tile % in_group;
    const int height = min(work.group, work.tiles_m - first);
    return {(first + rest % height) * rows, rest / height * width};
}

template <bool silu>
__device__ __forceinline__ float gated(float g, float u) {
    const float z = silu ? g : 2.0f * 0.7978845608028654f * (g + 0.044715f * g * g * g);
    // __expf and __fdividef without their handling of denormals: 1 + e^80 is far from where that matters.
    float power, share;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fminf(-z, 80.0f) * 1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.0f + power));
    return g * share * u;
}
template <bool silu>
__device__ __forceinline__ uint32_t gated_two(const float* g, const float* u) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(gated<silu>(g[0], u[0]), gated<silu>(g[1], u[1]));
    return reinterpret_cast<const uint32_t&>(two);
}

// Writes a warp's 16 rows from the accumulators to the output buffer. Of eight columns a thread holds two in row
// lane / 4 and two in row lane / 4 + 8, as stmatrix expects. A lane's address is a row of one of up to four 8x8
// matrices.
template <class S, bool silu, int width>
__device__ __forceinline__ void put_out(uint32_t buffer, int warp, int lane, const float (&sums)[width]) {
    const int row = 16 * warp + (lane & 15);
    const float *const g = sums, *const u = sums + width / 2;
#pragma unroll
    for (int c = 0; c + 1 < width / 8; c += 2) {
        const uint32_t place = lane & 16 ? S::out_place(row, c + 1) : S::out_place(row, c);
        const int i = 4 * c;
        store_matrices(buffer + place, gated_two<silu>(g + i, u + i), gated_two<silu>(g + i + 2, u + i + 2),
                       gated_two<silu>(g + i + 4, u + i + 4), gated_two<silu>(g + i + 6, u + i + 6));
    }
    if constexpr (width / 8 % 2 == 1) {
        constexpr int c = width / 8 - 1, i = 4 * c;
        store_matrices(buffer + S::out_place(row, c), gated_two<silu>(g + i, u + i),
                       gated_two<silu>(g + i + 2, u + i + 2));
    }
}

template <int rows, int width>
__global__ void __launch_bounds__(Sizes<rows, width>::kThreads, 1)
    gated_kernel(const __grid_constant__ Maps maps, const Work work) {
    using S = Sizes<rows, width>;
    extern __shared__ uint8_t shared_bytes[];
    const uint32_t stages = (shared_address(shared_bytes) + 1023) & ~1023u;
    const uint32_t out_buffer = stages + S::kStages * S::kStageBytes;
    const uint32_t full = out_buffer + S::kOutBytes, empty = full + 8 * S::kStages;
    const int tiles = work.tiles_m * work.tiles_n;
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            barrier_init(full + 8 * s, 1);                    // the producer, and the bytes it announces
            barrier_init(empty + 8 * s, 4 * S::kConsumers);   // every consumer warp, when it has finished the stage
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    if (warpgroup == 0) {
        if constexpr (S::kConsumers == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            prefetch_map(&maps.x);
            prefetch_map(&maps.w);
            int stage = 0;
            uint32_t parity = 1;  // the ring starts empty
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const int2 origin = tile_origin<rows, width>(work, tile);
#pragma unroll 1
                for (int step = 0; step < work.k_steps; ++step) {
                    const uint32_t x_tile = stages + stage * S::kStageBytes, w_tile = x_tile + S::kXBytes;
                    const uint32_t arrived = full + 8 * stage;
                    const int k = step * kDepth;
                    barrier_wait(empty + 8 * stage, parity);
                    barrier_expect(arrived, S::kStageBytes);  // bytes past the end count too, as zeros
                    load_box(&maps.x, x_tile, arrived, k, origin.x, work.x_policy);
                    load_box(&maps.w, w_tile, arrived, k, origin.y, work.w_policy);
                    load_box(&maps.w, w_tile + S::kHalfBytes, arrived, k, origin.y + work.n, work.w_policy);
                    if (++stage == S::kStages) {
                        stage = 0;
                        parity ^= 1;
                    }
                }
            }
        }
    } else {
        if constexpr (S::kConsumers == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int part = warpgroup - 1, warp = threadIdx.x / 32 % 4;
        const bool leads = threadIdx.x % 128 == 0;
        const uint32_t my_out = out_buffer + part * (S::kOutBytes / S::kConsumers);
        const uint64_t x_first = tile_descriptor(stages + part * 64 * kDepth * 2);
        const uint64_t w_first = tile_descriptor(stages + S::kXBytes);
        const auto release = [&](int stage) {  // called by each warp, once its own products are done
            if (lane == 0) barrier_arrive(empty + 8 * stage);
            __syncwarp();
        };
        int stage = 0;
        uint32_t parity = 0;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            float sums[width];  // gate in the first half, up in the second
            int before = 0;
#pragma unroll 1
            for (int step = 0; step < work.k_steps; ++step) {
                barrier_wait(full + 8 * stage, parity);
                __syncwarp();
                const uint64_t at = static_cast<uint64_t>(stage * (S::kStageBytes >> 4));
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kDepth / 16; ++k)  // 16 channels are 32 bytes, 2 units of a descriptor
                    wgmma<width>(sums, x_first + at + 2 * k, w_first + at + 2 * k, step | k);
                wgmma_commit();
                wgmma_wait<1>();  // this step's products may still run; those of the step before are done
                if (step > 0) release(before);
                before = stage;
                if (++stage == S::kStages) {
                    stage = 0;
                    parity ^= 1;
                }
            }
            wgmma_wait<0>();
            pin(sums);
            release(before);

            const int2 origin = tile_origin<rows, width>(work, tile);
            if (leads) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the buffer was read
            named_sync<128>(1 + part);
            if (work.silu) put_out<S, true>(my_out, warp, lane, sums);
            else put_out<S, false>(my_out, warp, lane, sums);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            named_sync<128>(1 + part);
            if (leads) {
                for (int b = 0; b < width / S::kBox; ++b)
                    store_box(&maps.out, my_out + b * (64 * S::kBox * 2), origin.y + b * S::kBox, origin.x + part * 64);
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            }
            __syncwarp();
        }
        if (leads) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}

// ---- host side ----

// A map of a row-major bfloat16 matrix in boxes of box_rows by box_columns. Where a box sticks out, reads give 0.
CUtensorMap matrix_map(const void* data, int64_t rows, int64_t columns, int box_rows, int box_columns,
                       CUtensorMapSwizzle swizzle) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {  // from the driver, which the module is not linked with
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        const char* const name = "cuTensorMapEncodeTiled";
        cuda_check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
        if (!found) throw std::runtime_error("cuTensorMapEncodeTiled: the driver has none");
        return reinterpret_cast<Encode>(found);
    }();
    CUtensorMap map;
    const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t stride[1] = {static_cast<cuuint64_t>(columns) * 2};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t every[2] = {1, 1};
    const CUresult code = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), size, stride, box,
                                 every, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(code));
    return map;
}

int64_t tiles_over(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

struct Call {
    int device;
    cudaStream_t stream;
    GatedShape shape;
    const void *x, *w;
    void* out;
};

template <int rows, int width>
void launch(const Call& call) {
    using S = Sizes<rows, width>;
    const auto kernel = gated_kernel<rows, width>;
    const auto [m, n, k, silu] = call.shape;
    const int64_t tiles_m = tiles_over(m, rows), tiles_n = tiles_over(n, width), tiles = tiles_m * tiles_n;
    check(tiles < INT32_MAX / 2, "m, n", "make too many tiles");
    const Work work{static_cast<int>(n),
                    static_cast<int>(k / kDepth),
                    static_cast<int>(tiles_m),
                    static_cast<int>(tiles_n),
                    kGroupRows / rows,
                    silu,
                    kEvictLast,
                    kEvictFirst};
    allow_shared(kernel, S::kSharedBytes, call.device);
    const Maps maps{matrix_map(call.x, m, k, rows, kDepth, CU_TENSOR_MAP_SWIZZLE_128B),
                    matrix_map(call.w, 2 * n, k, width, kDepth, CU_TENSOR_MAP_SWIZZLE_128B),
                    matrix_map(call.out, m, n, 64, S::kBox, S::kBoxSwizzle)};
    const int grid = persistent_grid(kernel, S::kThreads, S::kSharedBytes, tiles, call.device);
    kernel<<<grid, S::kThreads, S::kSharedBytes, call.stream>>>(maps, work);
    cuda_check(cudaGetLastError(), "gated_linear");
}

struct Kernel {
    int rows, width;
    void (*launch)(const Call&);
};
constexpr Kernel kKernels[] = {
    {128, 128, launch<128, 128>}, {128, 120, launch<128, 120>}, {128, 112, launch<128, 112>},
    {128, 96, launch<128, 96>},   {128, 72, launch<128, 72>},   {64, 120, launch<64, 120>},
    {64, 112, launch<64, 112>},   {64, 96, launch<64, 96>},     {64, 72, launch<64, 72>},
};

}  // namespace

std::vector<GatedTile> gated_tiles() {
    std::vector<GatedTile> tiles;
    for (const Kernel& kernel : kKernels) tiles.push_back({kernel.rows, kernel.width});
    return tiles;
}

void gated_linear(int device, uintptr_t stream, const GatedShape& shape, const GatedTile& tile, const void* x,
                  const void* w, void* out) {
    for (const int64_t size : {shape.m, shape.n, shape.k}) check_positive(size, "m, n or k");
    check(shape.m <= INT32_MAX / 2 && shape.n <= INT32_MAX / 4 && shape.k <= INT32_MAX / 2, "m, n, k", "are too large");
    check(shape.n % 8 == 0, "n", std::to_string(shape.n) + " is not a multiple of 8");
    check(shape.k % kDepth == 0, "k", std::to_string(shape.k) + " is not a multiple of 64");
    for (const void* pointer : {x, w, static_cast<const void*>(out)}) {
        check_pointer(pointer, "x, w or out");
        check(is_aligned(pointer, 16), "x, w or out", "is not at a multiple of 16 bytes");
    }
    for (const Kernel& kernel : kKernels) {
        if (kernel.rows != tile.rows || kernel.width != tile.width) continue;
        const OnDevice current(device);
        return kernel.launch({device, reinterpret_cast<cudaStream_t>(stream), shape, x, w, out});
    }
    check(false, "tile", std::to_string(tile.rows) + " rows by " + std::to_string(tile.width) + " columns is not there");
}

}  // namespace nla
