// Matrix products by cublasLt with a choice of algorithm; bfloat16 with float32 sums.
// Takes the cublasLt that the process has loaded already (torch brings it along) and links none, so that it builds and
// imports without CUDA. Knows nothing of timing or of which algorithm to choose.
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

// Whether the process has loaded a cublasLt of a version known here (12 or 13).
bool matmul_available();

// One product on one device. Raises std::runtime_error for what cublasLt reports.
class Matmul {
  public:
    // The device must be the current one, here and in run.
    Matmul(int device, const MatmulShape& shape, size_t workspace_bytes);
    ~Matmul();

    // How many algorithms cublasLt proposes, the one it likes best first; 0 if it has none for the shape.
    int algorithms() const;

    // One product on `stream` (a cudaStream_t): no allocation, no synchronisation, fit for CUDA graphs.
    // Pointers are multiples of 256; bias is null where the shape has none; workspace has the bytes named above.
    void run(int algorithm, uintptr_t stream, const void* x, const void* w, const void* bias, void* out,
             void* workspace) const;

  private:
    struct Plan;
    std::unique_ptr<Plan> plan_;
};

}  // namespace nla
