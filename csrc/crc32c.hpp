// CRC-32C (Castagnoli), the checksum after every Zarr chunk.
// Shards do not use the google-crc32c package, which holds the interpreter's lock for all buffers except bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nla {

// The checksum of `size` bytes, by SSE4.2 if the processor has it (checked once, at run time), else by tables.
uint32_t crc32c(const void* data, size_t size);

// The table version only: the portable path, and the reference that the other is tested against.
uint32_t crc32c_portable(const void* data, size_t size);

}  // namespace nla
