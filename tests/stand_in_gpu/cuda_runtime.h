// As much of CUDA as the encoder, the decoder and the sum over ranks say, for a C++ compiler: what a thread asks of its warp, its CTA and the
// copy engine is answered by gpu.cpp, which runs the threads one at a time in an order of its own.
// Shared variables are static (one CTA runs at a time, and finds what the one before it left), see __init__.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __constant__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Dim { int x; };
extern Dim threadIdx, blockIdx, blockDim, gridDim;

// ---- what gpu.cpp answers ----

void meet_warp(void* mine, const std::function<void(void** all)>& exchange);  // runs once, when all 32 are there
void meet_cta();
void give_way();  // lets other threads of the CTA go on
void* shared_memory();
void launch_on_host(const std::function<void()>& kernel, int grid, int threads, size_t shared, void* stream);
void __pipeline_memcpy_async(void* to, const void* from, size_t bytes);
void __pipeline_wait_prior(int);
inline void __pipeline_commit() {}
inline void __syncthreads() { meet_cta(); }
inline void __syncwarp() { meet_warp(nullptr, [](void**) {}); }

// ---- warps ----

template <typename T, typename From>
T shuffled(T value, From from) {
    struct Lane { T in, out; } mine{value, value};
    meet_warp(&mine, [from](void** all) {
        for (int i = 0; i < 32; ++i) static_cast<Lane*>(all[i])->out = static_cast<Lane*>(all[from(i)])->in;
    });
    return mine.out;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) { return shuffled(value, [mask](int i) { return i ^ mask; }); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return shuffled(value, [lane](int) { return lane; }); }
template <typename T>
T __shfl_down_sync(unsigned, T value, int by) { return shuffled(value, [by](int i) { return std::min(i + by, 31); }); }

// ---- bits and arithmetic: every operation rounds once ----

inline float __uint_as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline uint32_t __float_as_uint(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
inline int __dp4a(int a, int b, int sum) {
    for (int shift = 0; shift < 32; shift += 8) sum += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
    return sum;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
template <typename T>
T __ldg(const T* at) { return *at; }
template <typename T>
T __ldcs(const T* at) { return *at; }
inline int atomicAdd(int32_t* at, int by) { const int old = *at; *at += by; return old; }
inline void atomicMax(uint32_t* at, uint32_t value) { *at = std::max(*at, value); }

// ---- 16-bit floats ----

inline float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                      : std::ldexp(static_cast<float>(fraction), -24);
    return bits >> 15 ? -size : size;
}
inline uint16_t to_half(float value) {
    const uint32_t bits = __float_as_uint(value), size = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    if (size > 0x7f800000u) return sign | 0x7fff;
    if (size >= 0x477ff000u) return sign | 0x7c00;  // 65520 and more
    if (size < 0x38800000u) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));
    return sign | (size + 0xfffu + (size >> 13 & 1) - 0x38000000u) >> 13;
}
struct __half {
    uint16_t bits;
    operator float() const { return from_half(bits); }
};
struct __half2 { __half x, y; };
struct __nv_bfloat16 {
    uint16_t bits;
    operator float() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return {to_half(value)}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float2 __half22float2(__half2 two) { return {two.x, two.y}; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {  // NaN aside
    const uint32_t bits = __float_as_uint(value);
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }

// ---- the runtime: one device, of so many multiprocessors that hold one CTA each ----

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess, cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
extern int multiprocessors;
inline const char* cudaGetErrorString(int) { return "an error"; }
inline int cudaGetLastError() { return cudaSuccess; }
inline int cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline int cudaSetDevice(int) { return cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? multiprocessors : 227 << 10;
    return cudaSuccess;
}
template <typename Kernel>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel, int, size_t) { *count = 1; return cudaSuccess; }
template <typename Kernel>
int cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }
