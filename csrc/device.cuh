// The host side of every kernel: CUDA's return codes, the current device, how many CTAs it holds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "checks.hpp"

namespace nla {

inline void cuda_check(cudaError_t code, const char* what) {
    if (code != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

// Makes `device` current for the lifetime of this object.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        cuda_check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) cuda_check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = device != before_;
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }

  private:
    int before_ = 0;
    bool changed_ = false;
};

inline int processors(int device) {
    int count = 0;
    cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

// As many CTAs as the device holds at once, but no more than there are pieces of work.
template <typename Kernel>
int persistent_grid(Kernel kernel, int threads, size_t shared, int64_t pieces, int device) {
    int resident = 0;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    const int64_t most = int64_t{processors(device)} * (resident > 0 ? resident : 1);
    return static_cast<int>(pieces < most ? pieces : most);
}

// Lets `kernel` use `shared` bytes of dynamic shared memory, or raises std::invalid_argument.
template <typename Kernel>
void allow_shared(Kernel kernel, size_t shared, int device) {
    int most = 0;
    cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    check(shared <= static_cast<size_t>(most), "shared memory",
          std::to_string(shared) + " bytes are needed, the device has " + std::to_string(most));
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
               "cudaFuncSetAttribute");
}

}  // namespace nla
