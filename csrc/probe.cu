// A kernel that does nothing, compiled for the architectures of the others: it loads where they do. See probe.hpp.
#include "probe.hpp"

#include <cuda_runtime.h>

namespace nla {
namespace {

__global__ void nothing() {}

}  // namespace

std::string cuda_fault(int device) {
    int before = 0;
    cudaFuncAttributes found;  // of loaded code: nothing is launched, so no stream that records a graph is disturbed
    cudaError_t code = cudaGetDevice(&before);
    if (code == cudaSuccess) code = cudaSetDevice(device);
    if (code == cudaSuccess) {
        code = cudaFuncGetAttributes(&found, nothing);
        cudaSetDevice(before);
    }
    cudaGetLastError();  // the next call shall not find this one's error
    return code == cudaSuccess ? "" : cudaGetErrorString(code);
}

}  // namespace nla
