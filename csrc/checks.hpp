// Argument checks at the boundary to Python: std::invalid_argument (ValueError there) names the thing and the fault.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace nla {

inline void check(bool holds, const std::string& thing, const std::string& fault) {
    if (!holds) throw std::invalid_argument(thing + ": " + fault);
}

inline void check_positive(int64_t value, const char* thing) {
    check(value > 0, thing, std::to_string(value) + " is not positive");
}

inline void check_pointer(const void* pointer, const char* thing) {
    check(pointer != nullptr, thing, "is a null pointer");
}

inline bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

inline bool is_aligned(const void* pointer, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace nla
