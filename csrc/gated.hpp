// The first half of a gated MLP in one launch: two products, and the gate between them. For Hopper only (sm_90a).
// The caller chooses the tile.
#pragma once

#include <cstdint>
#include <vector>

namespace nla {

// out [m, n] = act(x [m, k] Wg^T) * (x Wu^T). w [2 n, k] holds the rows of Wg and below them those of Wu.
// bfloat16, contiguous; sums, gate and product in float32, rounded once. act: silu, else gelu approximated by tanh.
struct GatedShape {
    int64_t m, n, k;  // n a multiple of 8, k of 64
    bool silu;
};

// How the work is cut: rows of x and columns of out that a CTA computes at a time.
struct GatedTile {
    int rows, width;
};

// Every available tile.
std::vector<GatedTile> gated_tiles();

// One launch on `stream` (a cudaStream_t) of `device`: no allocation, no synchronisation, fit for CUDA graphs; the same
// bits every time. Pointers are multiples of 16 bytes. Raises std::invalid_argument for invalid arguments and
// std::runtime_error for errors of CUDA.
void gated_linear(int device, uintptr_t stream, const GatedShape& shape, const GatedTile& tile, const void* x,
                  const void* w, void* out);

}  // namespace nla
