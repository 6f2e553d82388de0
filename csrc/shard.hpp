// One Zarr v3 shard (codec `sharding_indexed`, index at the end; inner codecs `bytes`, `crc32c`) as bytes and as a file.
// Knows nothing of arrays, rows or commits.
//
//     chunk 0 | crc32c | chunk 1 | crc32c | ... | (u64 offset, u64 nbytes) per chunk | crc32c of the index
//
// All numbers little-endian; nbytes counts the checksum; an absent chunk is 2^64-1, 2^64-1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace nla {

// A file operation that failed: becomes OSError(error, ..., path) in Python.
struct FileError : std::runtime_error {
    FileError(int error, std::string path);
    int error;
    std::string path;
};

struct ShardLayout {
    size_t chunk_bytes;
    size_t chunks_per_shard;

    // Raises std::invalid_argument if `data_bytes` do not fit in one shard.
    ShardLayout(int64_t chunk_bytes, int64_t chunks_per_shard, size_t data_bytes);

    size_t chunks(size_t data_bytes) const { return (data_bytes + chunk_bytes - 1) / chunk_bytes; }
    size_t shard_bytes(size_t data_bytes) const;
};

// Fills out[shard_bytes(data_bytes)]. The last chunk is padded with zeros; chunks beyond the data are absent.
void build_shard(const ShardLayout& layout, const uint8_t* data, size_t data_bytes, uint8_t* out);

// The same bytes as a file at `path`: written to a temporary name beside it, synced, renamed, directory synced.
void write_shard(const ShardLayout& layout, const uint8_t* data, size_t data_bytes, const std::string& path);

}  // namespace nla
