// An empty kernel, compiled for the same architectures as the others, so it loads where they do. See probe.hpp.
#include "probe.hpp"

#include <cuda_runtime.h>

namespace nla {
namespace {

__global__ void nothing() {}

}  // namespace

std::string cuda_fault(int device) {
    int before = 0;
    cudaFuncAttributes found;  // of loaded code: nothing is launched, so no capture of a graph is disturbed
    cudaError_t code = cudaGetDevice(&before);
    if (code == cudaSuccess) code = cudaSetDevice(device);
    if (code == cudaSuccess) {
        code = cudaFuncGetAttributes(&found, nothing);
        cudaSetDevice(before);
    }
    cudaGetLastError();  // clears the error, so that the next call does not find it
    return code == cudaSuccess ? "" : cudaGetErrorString(code);
}

}  // namespace nla
