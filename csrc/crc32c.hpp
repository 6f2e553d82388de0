// CRC-32C (Castagnoli), the checksum behind every Zarr chunk. Knows nothing of chunks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nla {

// The checksum of `size` bytes. SSE4.2 where the processor has it (asked once, at run time), else tables.
uint32_t crc32c(const void* data, size_t size);

// The table version alone: the portable path, and what the other is tested against.
uint32_t crc32c_portable(const void* data, size_t size);

bool crc32c_has_hardware();

}  // namespace nla
