// Whether a device can run the kernels of this module, according to CUDA itself.
#pragma once

#include <string>

namespace nla {

// Why it cannot, in CUDA's words: for example an old driver, or no code for such a card. Empty if it can.
std::string cuda_fault(int device);

}  // namespace nla
