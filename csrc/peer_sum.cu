// Sums over GPUs by loads and stores: a rank reads its share of every rank's part, and writes its share of y to every
// rank. Arguments: peer_sum.hpp. (Two-shot all-reduce: Rabenseifner, ICCS 2004.)
//
// What orders it, in PTX's memory model. Program p of a rank meets program p of the others twice, see `meet`:
//   before it reads: a rank comes here in a launch, so the kernels before it in its stream have ended. Its part is
//     there, and what reads its last sums has ended: both may be read and written from here on.
//   after it has written: all that program p reads of this rank, and writes to it, is done.
// A launch ends when all its programs have met twice. Then this rank's y is whole and visible to the kernels after it,
// and nobody reads its part any more. A later launch on another rank cannot disturb this one: its programs wait at their
// first meeting until this rank comes there too. So launches may differ in size and in programs, and need one set of
// words, as the meetings of a program are counted and the number may only run ahead by one.
//
// No program waits for another one of its own launch. So a launch ends although only some of its programs are resident,
// if the lowest ones start first, as they do in practice. To rely on that less, two CTAs fit on a multiprocessor: 128 are
// resident on 64 of them, beside the CTAs of NCCL, which may wait for other GPUs too.
#include "peer_sum.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "device.cuh"
#include "signals.cuh"

namespace nla {
namespace {

constexpr int kThreads = 512;
constexpr int kShareMultiple = 32;  // packs: the lanes of a warp, 512 bytes
constexpr int kLooks = 1024;        // at other ranks between two looks at the host's memory, which is far

using Args = PeerSumArgs;

// 16 bytes of a tensor, as they lie in memory and as numbers.
template <typename T>
struct Pack {
    static constexpr int kSize = 16 / sizeof(T);
    float v[kSize];

    __device__ __forceinline__ void add(const uint4& bits) {
        const T* const more = reinterpret_cast<const T*>(&bits);
#pragma unroll
        for (int i = 0; i < kSize; ++i) v[i] += static_cast<float>(more[i]);
    }
    __device__ __forceinline__ uint4 rounded() const {
        uint4 bits;
        T* const out = reinterpret_cast<T*>(&bits);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            if constexpr (std::is_same_v<T, float>) out[i] = v[i];
            else if constexpr (std::is_same_v<T, __half>) out[i] = __float2half_rn(v[i]);
            else out[i] = __float2bfloat16_rn(v[i]);
        }
        return bits;
    }
};

__device__ __forceinline__ uint4* packs(const Args& args, int peer, int64_t offset) {
    return reinterpret_cast<uint4*>(args.memory[peer] + offset);
}

// Waits until this program is here on every rank. What all of them wrote before, and what they knew to be written, this
// CTA sees after it: a barrier, a release and an acquire by one thread per peer, a barrier.
__device__ __forceinline__ void meet(const Args& args, uint32_t meeting) {
    __syncthreads();
    const int peer = threadIdx.x;
    if (peer > 0 && peer < args.ranks) {
        const int row = blockIdx.x * kMostRanks, after = args.rank + peer;
        const int other = after < args.ranks ? after : after - args.ranks;
        send(reinterpret_cast<uint32_t*>(args.memory[peer]) + row + args.rank, meeting);
        const uint32_t* const word = reinterpret_cast<const uint32_t*>(args.memory[0]) + row + other;
        int looks = 0;
        while (static_cast<int32_t>(received(word) - meeting) < 0)  // a difference, as the numbers wrap around
            if (++looks % kLooks == 0 && seen(args.stop) != 0) break;
    }
    __syncthreads();
}

// most: at least as many as there are ranks.
template <typename T, int most>
__global__ void __launch_bounds__(kThreads, 2) peer_sum_kernel(const __grid_constant__ Args args, int start, int end) {
    constexpr int kAtOnce = most <= 4 ? 2 : 1;  // packs of a thread whose loads are all on their way before one is used
    const uint32_t met = args.turn[blockIdx.x];
    meet(args, met + 1);
    const int step = gridDim.x * kThreads;
    for (int first = start + blockIdx.x * kThreads + threadIdx.x; first < end; first += kAtOnce * step) {
        uint4 x[kAtOnce] = {}, parts[kAtOnce][most] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = first + i * step;
            if (at >= end) continue;
            if (args.x) x[i] = static_cast<const uint4*>(args.x)[at];
#pragma unroll
            for (int peer = 0; peer < most; ++peer)
                if (peer < args.ranks) parts[i][peer] = packs(args, peer, args.part)[at];
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = first + i * step;
            if (at >= end) continue;
            Pack<T> total{};
            total.add(x[i]);
#pragma unroll
            for (int peer = 0; peer < most; ++peer) total.add(parts[i][peer]);
            const uint4 y = total.rounded();
#pragma unroll
            for (int peer = 0; peer < most; ++peer)
                if (peer < args.ranks) packs(args, peer, args.sum)[at] = y;
        }
    }
    meet(args, met + 2);
    if (threadIdx.x == 0) args.turn[blockIdx.x] = met + 2;
}

template <typename T, int most>
void launch(const Args& args, int programs, cudaStream_t stream) {
    const int64_t packs = (args.size + Pack<T>::kSize - 1) / Pack<T>::kSize;
    check(packs <= INT32_MAX / 4, "size", "is too large");
    const int64_t each = int64_t{kShareMultiple} * args.ranks;
    const int share = static_cast<int>((packs + each - 1) / each) * kShareMultiple;
    const int count = static_cast<int>(packs), start = std::min(share * args.rank, count);
    const int end = std::min(start + share, count), grid = std::min((share + kThreads - 1) / kThreads, programs);
    peer_sum_kernel<T, most><<<grid, kThreads, 0, stream>>>(args, start, end);
    cuda_check(cudaGetLastError(), "peer_sum");
}

template <typename T>
void launch(const Args& args, int programs, cudaStream_t stream) {
    if (args.ranks <= 2) return launch<T, 2>(args, programs, stream);
    if (args.ranks <= 4) return launch<T, 4>(args, programs, stream);
    launch<T, 8>(args, programs, stream);
}

}  // namespace

void peer_sum(int device, uintptr_t stream, int programs, const PeerSumArgs& args) {
    check(args.ranks > 0 && args.ranks <= kMostRanks, "ranks", std::to_string(args.ranks) + " are not 1 to 8");
    check(args.rank >= 0 && args.rank < args.ranks, "rank", std::to_string(args.rank) + " is not one of the ranks");
    check(programs > 0 && programs <= kMostPrograms, "programs", std::to_string(programs) + " are not 1 to 128");
    check_positive(args.size, "size");
    for (int peer = 0; peer < args.ranks; ++peer) {
        check_pointer(args.memory[peer], "memory");
        check(is_aligned(args.memory[peer], 16), "memory", "is not at a multiple of 16 bytes");
    }
    check(args.part % 16 == 0 && args.sum % 16 == 0 && is_aligned(args.x, 16), "part, sum or x",
          "is not at a multiple of 16 bytes");
    check_pointer(args.turn, "turn");
    check_pointer(args.stop, "stop");
    const OnDevice current(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    switch (args.kind) {
        case FloatKind::float32: return launch<float>(args, programs, cuda_stream);
        case FloatKind::float16: return launch<__half>(args, programs, cuda_stream);
        case FloatKind::bfloat16: return launch<__nv_bfloat16>(args, programs, cuda_stream);
    }
}

}  // namespace nla
