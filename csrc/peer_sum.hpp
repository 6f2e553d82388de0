// The sum of a tensor of every rank in one launch, over GPUs that write each other's memory (ops/peer_sum.py).
#pragma once

#include <cstdint>

#include "encode.hpp"

namespace nla {

constexpr int kMostRanks = 8, kMostPrograms = 128;

// y = x + sum over ranks of part, in the memory of every rank. Sums in float32, rounded once.
//
// memory[k]: that of rank (rank + k) % ranks, here. It starts with the words uint32 [kMostPrograms, kMostRanks] by which
// programs meet: of each rank the last meeting it has come to. They start as zeros and belong to these launches alone.
struct PeerSumArgs {
    uint8_t* memory[kMostRanks];
    int rank, ranks;
    int64_t part, sum;       // bytes from a memory's start to the part [size] and to where y [size] goes; may be the same
    const void* x;           // [size], the same on every rank, may be this rank's y; null: 0
    int64_t size;            // elements
    FloatKind kind;
    uint32_t* turn;          // [kMostPrograms] of this rank: meetings that each program has had, zeros at first
    const uint32_t* stop;    // [1] the host's: if it is not 0, launches wait for nobody, and what they write means nothing
};

// One launch of at most `programs` CTAs on `stream` (a cudaStream_t) of `device`: no allocation, no synchronisation, fit
// for CUDA graphs. Every rank makes the same launches in the same order, on one stream. part, sum and x are multiples of
// 16 bytes, and the last 16 bytes of each that hold an element are read and written as a whole. Raises
// std::invalid_argument for invalid arguments and std::runtime_error for errors of CUDA.
void peer_sum(int device, uintptr_t stream, int programs, const PeerSumArgs& args);

}  // namespace nla
