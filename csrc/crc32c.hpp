// CRC-32C (Castagnoli), the checksum behind every Zarr chunk. Knows nothing of chunks.
// Shards do not take it from the google-crc32c package, which holds the interpreter's lock for all buffers but bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nla {

// The checksum of `size` bytes. SSE4.2 where the processor has it (asked once, at run time), else tables.
uint32_t crc32c(const void* data, size_t size);

// The table version alone: the portable path, and what the other is tested against.
uint32_t crc32c_portable(const void* data, size_t size);

}  // namespace nla
