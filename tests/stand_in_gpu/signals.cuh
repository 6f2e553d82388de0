// csrc/signals.cuh between processes on one machine. Who waits lets the others go on: threads of its CTA, and processes.
#pragma once

#include <sched.h>

#include "cuda_runtime.h"

namespace nla {

inline void send(uint32_t* word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    give_way();
}
inline uint32_t received(const uint32_t* word) {
    give_way();
    sched_yield();
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
inline uint32_t seen(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }

}  // namespace nla
