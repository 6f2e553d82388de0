#include "shard.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "checks.hpp"
#include "crc32c.hpp"

namespace nla {
namespace {

constexpr size_t kChecksum = 4;
constexpr size_t kEntry = 16;
constexpr size_t kPart = 2 << 20;  // bytes of a file that are written at a time

template <typename T>
uint8_t* put_little_endian(uint8_t* out, T value) {
    for (size_t i = 0; i < sizeof(T); ++i) *out++ = static_cast<uint8_t>(value >> (8 * i));
    return out;
}

// A file that is deleted unless it is renamed.
class TemporaryFile {
  public:
    explicit TemporaryFile(std::string path) : path_(std::move(path)) {
        descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (descriptor_ < 0) throw FileError(errno, path_);
    }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;
    ~TemporaryFile() {
        if (descriptor_ >= 0) ::close(descriptor_);
        if (!renamed_) ::unlink(path_.c_str());
    }

    void write(const uint8_t* data, size_t size) {
        off_t at = 0;
        while (size) {
            const ssize_t written = ::write(descriptor_, data, std::min(size, kPart));
            if (written < 0 && errno == EINTR) continue;
            if (written < 0) throw FileError(errno, path_);
#ifdef __linux__
            ::sync_file_range(descriptor_, at, written, SYNC_FILE_RANGE_WRITE);  // a hint that the disk may begin
#endif
            at += written;
            data += written;
            size -= static_cast<size_t>(written);
        }
    }

    void sync_and_rename(const std::string& target) {
        if (::fsync(descriptor_) != 0) throw FileError(errno, path_);
        const int closed = ::close(descriptor_);
        descriptor_ = -1;
        if (closed != 0) throw FileError(errno, path_);
        if (std::rename(path_.c_str(), target.c_str()) != 0) throw FileError(errno, target);
        renamed_ = true;
    }

  private:
    std::string path_;
    int descriptor_ = -1;
    bool renamed_ = false;
};

// After this the rename itself survives a power cut. A filesystem that cannot sync a directory is accepted.
void sync_directory(const std::string& path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) throw FileError(errno, path);
    const int error = ::fsync(descriptor) == 0 ? 0 : errno;
    ::close(descriptor);
    if (error && error != EINVAL && error != ENOTSUP) throw FileError(error, path);
}

std::string parent(const std::string& path) {
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

FileError::FileError(int error_, std::string path_)
    : std::runtime_error(path_ + ": " + std::strerror(error_)), error(error_), path(std::move(path_)) {}

ShardLayout::ShardLayout(int64_t chunk_bytes_, int64_t chunks_per_shard_, size_t data_bytes)
    : chunk_bytes(static_cast<size_t>(chunk_bytes_)), chunks_per_shard(static_cast<size_t>(chunks_per_shard_)) {
    check_positive(chunk_bytes_, "chunk_bytes");
    check_positive(chunks_per_shard_, "chunks_per_shard");
    check(chunks(data_bytes) <= chunks_per_shard, "data",
          std::to_string(data_bytes) + " bytes do not fit in " + std::to_string(chunks_per_shard) + " chunks of " +
              std::to_string(chunk_bytes));
}

size_t ShardLayout::shard_bytes(size_t data_bytes) const {
    return chunks(data_bytes) * (chunk_bytes + kChecksum) + chunks_per_shard * kEntry + kChecksum;
}

size_t ShardLayout::image_bytes() const { return shard_bytes(chunk_bytes * chunks_per_shard); }

void fill_shard(const ShardLayout& layout, uint8_t* image, const std::vector<Piece>& pieces) {
    const size_t room = layout.chunk_bytes * layout.chunks_per_shard;
    for (const Piece& piece : pieces)
        check(piece.size <= room && piece.start <= room - piece.size, "piece",
              std::to_string(piece.size) + " bytes at " + std::to_string(piece.start) + " stick out of " +
                  std::to_string(room));
    for (const Piece& piece : pieces) {
        for (size_t done = 0; done < piece.size;) {
            const size_t at = piece.start + done, chunk = at / layout.chunk_bytes, used = at % layout.chunk_bytes;
            const size_t size = std::min(layout.chunk_bytes - used, piece.size - done);
            std::memcpy(image + chunk * (layout.chunk_bytes + kChecksum) + used, piece.data + done, size);
            done += size;
        }
    }
}

size_t seal_shard(const ShardLayout& layout, uint8_t* image, size_t data_bytes) {
    const size_t present = layout.chunks(data_bytes);
    const size_t stride = layout.chunk_bytes + kChecksum;
    for (size_t i = 0; i < present; ++i) {
        uint8_t* const chunk = image + i * stride;
        const size_t size = std::min(layout.chunk_bytes, data_bytes - i * layout.chunk_bytes);
        std::memset(chunk + size, 0, layout.chunk_bytes - size);
        put_little_endian(chunk + layout.chunk_bytes, crc32c(chunk, layout.chunk_bytes));
    }
    uint8_t* const index = image + present * stride;
    uint8_t* entry = index;
    for (size_t i = 0; i < layout.chunks_per_shard; ++i) {
        entry = put_little_endian<uint64_t>(entry, i < present ? i * stride : ~uint64_t{0});
        entry = put_little_endian<uint64_t>(entry, i < present ? stride : ~uint64_t{0});
    }
    entry = put_little_endian(entry, crc32c(index, static_cast<size_t>(entry - index)));
    return static_cast<size_t>(entry - image);
}

void write_file(const std::string& path, const uint8_t* data, size_t size) {
    const std::string directory = parent(path);
    if (::access(directory.c_str(), F_OK) != 0) {
        if (::mkdir(directory.c_str(), 0777) != 0 && errno != EEXIST) throw FileError(errno, directory);
        sync_directory(parent(directory));
    }
    TemporaryFile file(path + ".tmp");  // the store sweeps leftovers of this name (store/shards.py)
    file.write(data, size);
    file.sync_and_rename(path);
    sync_directory(directory);
}

}  // namespace nla
