// Matrix products by cublasLt with a choice of algorithm; bfloat16 with float32 sums.
// Uses the cublasLt that the process has already loaded (it comes with torch) and links none, so that it builds and
// imports without CUDA. The caller measures and chooses the algorithm.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace nla {

// out [m, n] = x [m, k] w [n, k]^T, + bias [n] if there is one, + out if it accumulates. All contiguous.
struct MatmulShape {
    int64_t m, n, k;
    bool bias;
    bool accumulate;
};

// Whether the process has loaded a cublasLt of version 12 or 13.
bool matmul_available();

// One product on one device. Raises std::runtime_error for errors of cublasLt.
class Matmul {
  public:
    // The device must be the current one, here and in run.
    Matmul(int device, const MatmulShape& shape, size_t workspace_bytes);
    ~Matmul();

    // How many algorithms cublasLt proposes, its first choice first; 0 if it has none for the shape.
    int algorithms() const;

    // One product on `stream` (a cudaStream_t): no allocation, no synchronisation, fit for CUDA graphs.
    // Pointers are multiples of 256 bytes; bias is null if the shape has none; workspace has `workspace_bytes`.
    void run(int algorithm, uintptr_t stream, const void* x, const void* w, const void* bias, void* out,
             void* workspace) const;

  private:
    struct Plan;
    std::unique_ptr<Plan> plan_;
};

}  // namespace nla
