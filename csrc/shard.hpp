// One Zarr v3 shard (codec `sharding_indexed`, index at the end; inner codecs `bytes`, `crc32c`) as bytes and as a file.
//
//     chunk 0 | crc32c | chunk 1 | crc32c | ... | (u64 offset, u64 nbytes) per chunk | crc32c of the index
//
// All numbers little-endian; nbytes counts the checksum; an absent chunk is 2^64-1, 2^64-1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace nla {

// A failed file operation: becomes OSError(error, ..., path) in Python.
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
    size_t image_bytes() const;
};

// `size` bytes that go to byte `start` of a shard's data, not counting checksums.
struct Piece {
    size_t start;
    const uint8_t* data;
    size_t size;
};

// Copies pieces to their places in `image`. Raises std::invalid_argument if one sticks out, before anything is copied.
void fill_shard(const ShardLayout& layout, uint8_t* image, const std::vector<Piece>& pieces);

// `image` holds the raw chunks at their places in the file, with room for a whole shard. Pads the last chunk that has
// data with zeros, and adds checksums and index. Returns the size of the file. Chunks beyond the data are absent.
size_t seal_shard(const ShardLayout& layout, uint8_t* image, size_t data_bytes);

// Writes `size` bytes as a file, completely or not at all, and durably: writes to a temporary name beside `path`,
// syncs, renames, syncs the directory. Makes the directory if it is missing.
void write_file(const std::string& path, const uint8_t* data, size_t size);

}  // namespace nla
