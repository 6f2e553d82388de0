// Runs a kernel's threads as coroutines, whichever can go on in random order, and copies that are under way when nobody
// waits for them yet land at once or at the wait, with garbage in their place until then.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "encode.hpp"
#include "peer_sum.hpp"

Dim threadIdx, blockIdx, blockDim, gridDim;
int multiprocessors;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kGarbage = 0x7b;

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};
struct Thread {
    ucontext_t start;
    jmp_buf here;  // from then on: a jump asks nothing of the system
    std::unique_ptr<char[]> stack{new char[kStack]};
    std::vector<Copy> under_way;
    void* mine = nullptr;
    bool started = false, waits = false, ended = false;
};

std::mt19937 chance;
std::vector<Thread> threads;
std::vector<int> arrived;  // of each warp
std::vector<uint4> shared;
std::function<void()> running;
jmp_buf scheduler;
int current, arrived_in_cta, left;

void go_on_later() {
    if (_setjmp(threads[current].here) == 0) _longjmp(scheduler, 1);
}

void go_on(Thread& thread) {
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.here, 1);
    thread.started = true;
    setcontext(&thread.start);
}

void run_thread() {
    running();
    threads[current].ended = true;
    --left;
    go_on_later();
}

void run_cta(int cta, int count) {
    for (uint4& word : shared) memset(&word, kGarbage, sizeof word);
    arrived.assign(count / 32, 0);
    arrived_in_cta = 0;
    left = count;
    for (int i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        thread.started = thread.waits = thread.ended = false;
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.get();
        thread.start.uc_stack.ss_size = kStack;
        makecontext(&thread.start, run_thread, 0);
    }
    std::vector<int> ready;
    while (left) {
        ready.clear();
        for (int i = 0; i < count; ++i)
            if (!threads[i].waits && !threads[i].ended) ready.push_back(i);
        if (ready.empty()) throw std::runtime_error("every thread waits for another");
        std::shuffle(ready.begin(), ready.end(), chance);
        for (const int i : ready) {
            current = i;
            threadIdx.x = i;
            blockIdx.x = cta;
            go_on(threads[i]);
        }
    }
    for (int i = 0; i < count; ++i)
        if (!threads[i].under_way.empty()) throw std::runtime_error("a thread ended before its copies");
}

}  // namespace

void meet_warp(void* mine, const std::function<void(void** all)>& exchange) {
    const int warp = current / 32;
    threads[current].mine = mine;
    threads[current].waits = true;
    if (++arrived[warp] == 32) {
        void* all[32];
        for (int i = 0; i < 32; ++i) all[i] = threads[32 * warp + i].mine;
        exchange(all);
        arrived[warp] = 0;
        for (int i = 0; i < 32; ++i) threads[32 * warp + i].waits = false;
    }
    go_on_later();
}

void meet_cta() {
    threads[current].waits = true;
    if (++arrived_in_cta == left) {
        arrived_in_cta = 0;
        for (Thread& thread : threads) thread.waits = false;
    }
    go_on_later();
}

void give_way() { go_on_later(); }

void* shared_memory() { return shared.data(); }

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
    if (chance() % 2) {
        memcpy(to, from, bytes);
    } else {
        memset(to, kGarbage, bytes);
        threads[current].under_way.push_back({to, from, bytes});
    }
}

void __pipeline_wait_prior(int) {
    for (const Copy& copy : threads[current].under_way) memcpy(copy.to, copy.from, copy.bytes);
    threads[current].under_way.clear();
}

void launch_on_host(const std::function<void()>& kernel, int grid, int count, size_t bytes, void*) {
    if (threads.size() < static_cast<size_t>(count)) threads.resize(count);
    shared.resize(bytes / sizeof(uint4) + 1);
    running = kernel;
    gridDim.x = grid;
    blockDim.x = count;
    for (int cta = 0; cta < grid; ++cta) run_cta(cta, count);
}

// ---- for Python ----

namespace {

nla::CodecShape shape(int kind, int d, int block, int group) {
    return {static_cast<nla::CodecKind>(kind), d, block, group};
}

template <typename F>
const char* told(F f) {  // null, or what went wrong
    static std::string error;
    try {
        f();
        return nullptr;
    } catch (const std::exception& caught) {
        error = caught.what();
        return error.c_str();
    }
}

}  // namespace

extern "C" {

void start(unsigned seed, int count) {
    chance.seed(seed);
    multiprocessors = count;
}

const char* encode(int kind, int d, int block, int group, const void* hidden, int input, int64_t row_stride, int64_t rows,
                   const int64_t* dest, void* codes, void* scales, float* norm, float sink_norm, uint16_t* exact,
                   int64_t* exact_dest, int32_t* exact_count, int64_t exact_capacity) {
    return told([&] {
        nla::encode_rows(0, 0, {shape(kind, d, block, group), 0.0f, 0.0f, hidden, static_cast<nla::FloatKind>(input),
                                row_stride, rows, dest, codes, scales, norm, sink_norm, exact, exact_dest, exact_count,
                                exact_capacity});
    });
}

const char* decode(int kind, int d, int block, int group, const void* codes, const void* scales, const float* norm,
                   int64_t rows, void* out, int output) {
    return told([&] {
        nla::decode_rows(0, 0, {shape(kind, d, block, group), 0.0f, 0.0f, codes, scales, norm, rows, out,
                                static_cast<nla::FloatKind>(output)});
    });
}

const char* peer_sum(int programs, uint8_t* const* memory, int rank, int ranks, int64_t part, int64_t sum, const void* x,
                     int64_t size, int kind, uint32_t* turn, const uint32_t* stop) {
    return told([&] {
        nla::PeerSumArgs args{{}, rank, ranks, part, sum, x, size, static_cast<nla::FloatKind>(kind), turn, stop};
        std::copy(memory, memory + std::min(ranks, nla::kMostRanks), args.memory);
        nla::peer_sum(0, 0, programs, args);
    });
}

}  // extern "C"
