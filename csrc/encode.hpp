// The tap's kernels: rows of the residual stream -> codec bytes (encode.cu, encode_fast.cu) and back (decode.cu).
// nla_engine/codec/rows.py is the contract for the bits.
#pragma once

#include <cstdint>

namespace nla {

enum class CodecKind : int { bf16 = 0, int8 = 1, int4 = 2 };
enum class FloatKind : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A codec in numbers: d channels in blocks (rotated together), which consist of groups (one scale each).
struct CodecShape {
    CodecKind kind;
    int d;
    int block;
    int group;

    int code_bytes() const { return kind == CodecKind::int8 ? d : kind == CodecKind::int4 ? d / 2 : 2 * d; }
    int scales() const { return kind == CodecKind::bf16 ? 0 : d / group; }
};

struct EncodeArgs {
    CodecShape codec;
    float sqrt_d, unit;      // float32(sqrt(d)), float32(1 / sqrt(block)); filled in by encode_rows
    const void* hidden;      // [rows, d] of `input`, row_stride elements apart
    FloatKind input;
    int64_t row_stride;
    int64_t rows;
    const int64_t* dest;     // [rows] place in the stage, < 0: row is skipped
    void* codes;             // [stage, code_bytes()]
    void* scales;            // float16 [stage, scales()]
    float* norm;             // [stage]
    float sink_norm;         // rows with a larger norm are also kept exactly
    uint16_t* exact;         // [exact_capacity, d] bfloat16 bits
    int64_t* exact_dest;     // [exact_capacity] place in the stage of that row
    int32_t* exact_count;    // [1] only grows; may exceed the capacity: rows past it are not kept
    int64_t exact_capacity;
};

struct DecodeArgs {
    CodecShape codec;
    float sqrt_d, unit;
    const void* codes;       // [rows, code_bytes()]
    const void* scales;      // float16 [rows, scales()]
    const float* norm;       // [rows]
    int64_t rows;
    void* out;               // [rows, d] of `output`, contiguous
    FloatKind output;        // float32 or bfloat16
};

// Both: one launch on `stream` (a cudaStream_t) of `device`, no allocation, no synchronisation, fit for CUDA graphs.
// Raise std::invalid_argument for invalid arguments and std::runtime_error for errors of CUDA.
void encode_rows(int device, uintptr_t stream, EncodeArgs args);
void decode_rows(int device, uintptr_t stream, DecodeArgs args);

}  // namespace nla
