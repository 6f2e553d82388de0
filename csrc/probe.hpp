// Whether a device can run the kernels of this module, asked of CUDA itself. Knows no kernel.
#pragma once

#include <string>

namespace nla {

// Why it cannot, as CUDA says it: a driver that is too old, no code for such a card. Empty if it can.
std::string cuda_fault(int device);

}  // namespace nla
