// The PTX instructions of gated.cu: barriers, the copy engine, matrix instructions.
// Shared-memory addresses are 32-bit, in the window of the CTA.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nla {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase of parity `parity` has ended. The phase before the first counts as ended, with parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@ended bra DONE;\n"
        "bra AGAIN;\n"
        "DONE:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
template <int threads>
__device__ __forceinline__ void named_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

// ---- the copy engine: boxes of a matrix, (column, row) of the first element ----

__device__ __forceinline__ void load_box(const CUtensorMap* map, uint32_t to, uint32_t barrier, int column, int row,
                                         uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
                 "r"(column), "r"(row) : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- 8x8 matrices of 16-bit elements from registers to shared memory, one row address per lane ----

__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d) : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

// ---- wgmma ----

// A tile of rows of 128 bytes, swizzled in blocks of 8 rows. Its address is a multiple of such a block's 1024 bytes.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
    const uint64_t start = address >> 4, next_eight_rows = 1024 >> 4, swizzle_128 = 1;
    return start | 1ull << 16 | next_eight_rows << 32 | swizzle_128 << 62;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}
// The compiler moves no use of the sums ahead of this.
template <int n>
__device__ __forceinline__ void pin(float (&sums)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(sums[i]));
}

// The instruction lists its accumulators one by one, so names and operands are joined from groups of eight.
#define NLA_N9                                                               \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
    "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,"       \
    "%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"       \
    "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71"
#define NLA_N12                                                                                              \
    NLA_N9 ",%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NLA_N14 NLA_N12 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define NLA_N15 NLA_N14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define NLA_N16 NLA_N15 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define NLA_V1(i)                                                                                            \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
        "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define NLA_V3(i) NLA_V1(i), NLA_V1(i + 8), NLA_V1(i + 16)
#define NLA_V9 NLA_V3(0), NLA_V3(24), NLA_V3(48)
#define NLA_V12 NLA_V9, NLA_V3(72)
#define NLA_V14 NLA_V12, NLA_V1(96), NLA_V1(104)
#define NLA_V15 NLA_V14, NLA_V1(112)
#define NLA_V16 NLA_V15, NLA_V1(120)
#define NLA_WGMMA(columns, eights, a_name, b_name, add_name)                                                       \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" add_name ", 0;\n"                                        \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" NLA_N##eights "}, %" a_name ", " \
                 "%" b_name ", add, 1, 1, 0, 0;\n}" : NLA_V##eights : "l"(a), "l"(b), "r"(add) : "memory")

// sums = a [64, 16] b [2 width, 16]^T, added to the old sums if `add`; a and b are in shared memory. Asynchronous.
template <int width>
__device__ __forceinline__ void wgmma(float (&sums)[width], uint64_t a, uint64_t b, int add) {
    static_assert(width == 128 || width == 120 || width == 112 || width == 96 || width == 72);
    if constexpr (width == 128) NLA_WGMMA("256", 16, "128", "129", "130");
    if constexpr (width == 120) NLA_WGMMA("240", 15, "120", "121", "122");
    if constexpr (width == 112) NLA_WGMMA("224", 14, "112", "113", "114");
    if constexpr (width == 96) NLA_WGMMA("192", 12, "96", "97", "98");
    if constexpr (width == 72) NLA_WGMMA("144", 9, "72", "73", "74");
}

}  // namespace nla
