// Bindings of the extension nla_engine._C and nothing else: names, pointers as integers, the GIL and exceptions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "checks.hpp"
#include "crc32c.hpp"
#include "encode.hpp"
#include "gated.hpp"
#include "matmul.hpp"
#include "peer_sum.hpp"
#include "probe.hpp"
#include "shard.hpp"

namespace py = pybind11;

namespace {

// The bytes of any C-contiguous buffer (numpy array, bytes, memoryview), held for the lifetime of this object.
// Construct it under the GIL.
class Bytes {
  public:
    explicit Bytes(const py::object& object, int flags = PyBUF_SIMPLE) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
    }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    ~Bytes() { PyBuffer_Release(&view_); }
    uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }  // write only if PyBUF_WRITABLE was asked for
    size_t size() const { return static_cast<size_t>(view_.len); }

  private:
    Py_buffer view_;
};

// The layout of a shard with `data_bytes` bytes of data, after checking that `image` has its size.
nla::ShardLayout shard_layout(const Bytes& image, int64_t data_bytes, int64_t chunk_bytes, int64_t chunks_per_shard) {
    nla::check(data_bytes >= 0, "data_bytes", std::to_string(data_bytes) + " is negative");
    const nla::ShardLayout layout(chunk_bytes, chunks_per_shard, static_cast<size_t>(data_bytes));
    nla::check(image.size() == layout.image_bytes(), "image",
               std::to_string(image.size()) + " bytes, a shard needs " + std::to_string(layout.image_bytes()));
    return layout;
}

void fill_shard(const py::object& image, int64_t chunk_bytes, int64_t chunks_per_shard,
                const std::vector<std::pair<size_t, py::object>>& pieces) {
    const Bytes bytes(image, PyBUF_WRITABLE);
    const nla::ShardLayout layout = shard_layout(bytes, 0, chunk_bytes, chunks_per_shard);
    std::deque<Bytes> held;
    std::vector<nla::Piece> places;
    for (const auto& [start, piece] : pieces) {
        held.emplace_back(piece);
        places.push_back({start, held.back().data(), held.back().size()});
    }
    py::gil_scoped_release unlocked;
    nla::fill_shard(layout, bytes.data(), places);
}

size_t seal_shard(const py::object& image, int64_t data_bytes, int64_t chunk_bytes, int64_t chunks_per_shard) {
    const Bytes bytes(image, PyBUF_WRITABLE);
    const nla::ShardLayout layout = shard_layout(bytes, data_bytes, chunk_bytes, chunks_per_shard);
    py::gil_scoped_release unlocked;
    return nla::seal_shard(layout, bytes.data(), static_cast<size_t>(data_bytes));
}

void write_shard(const py::object& path, const py::object& image, int64_t data_bytes, int64_t chunk_bytes,
                 int64_t chunks_per_shard) {
    const auto encoded = py::reinterpret_steal<py::bytes>([&] {
        PyObject* bytes = nullptr;
        if (!PyUnicode_FSConverter(path.ptr(), &bytes)) throw py::error_already_set();
        return bytes;
    }());
    const std::string name = encoded;
    const Bytes bytes(image, PyBUF_WRITABLE);
    const nla::ShardLayout layout = shard_layout(bytes, data_bytes, chunk_bytes, chunks_per_shard);
    py::gil_scoped_release unlocked;
    const size_t size = nla::seal_shard(layout, bytes.data(), static_cast<size_t>(data_bytes));
    nla::write_file(name, bytes.data(), size);
}

uint32_t checksum(const py::object& data, bool portable) {
    const Bytes bytes(data);
    py::gil_scoped_release unlocked;
    return portable ? nla::crc32c_portable(bytes.data(), bytes.size()) : nla::crc32c(bytes.data(), bytes.size());
}

void raise_os_error(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const nla::FileError& error) {
        errno = error.error;
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
    }
}

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_matmul(py::module_& m) {
    using namespace py::literals;
    m.def("matmul_available", &nla::matmul_available, "Whether the process has loaded a supported cublasLt.");
    py::class_<nla::Matmul>(m, "Matmul", "Products of one shape by cublasLt (see csrc/matmul.hpp); addresses as integers.")
        .def(py::init([](int device, int64_t rows, int64_t n, int64_t k, bool bias, bool accumulate, size_t bytes) {
                 return std::make_unique<nla::Matmul>(device, nla::MatmulShape{rows, n, k, bias, accumulate}, bytes);
             }),
             "device"_a, py::kw_only(), "m"_a, "n"_a, "k"_a, "bias"_a, "accumulate"_a, "workspace_bytes"_a)
        .def_property_readonly("algorithms", &nla::Matmul::algorithms)
        .def(
            "run",
            [](const nla::Matmul& self, int algorithm, uintptr_t stream, uintptr_t x, uintptr_t w, uintptr_t bias,
               uintptr_t out, uintptr_t workspace) {
                self.run(algorithm, stream, pointer<void>(x), pointer<void>(w), pointer<void>(bias),
                         pointer<void>(out), pointer<void>(workspace));
            },
            "algorithm"_a, "stream"_a, py::kw_only(), "x"_a, "w"_a, "bias"_a, "out"_a, "workspace"_a);
}

#ifdef NLA_WITH_CUDA
nla::CodecShape codec_shape(const std::string& name, int d, int block, int group) {
    const auto kind = name == "bf16"   ? nla::CodecKind::bf16
                      : name == "int8" ? nla::CodecKind::int8
                      : name == "int4" ? nla::CodecKind::int4
                                       : throw py::value_error("codec '" + name + "' is unknown");
    return {kind, d, block, group};
}

nla::FloatKind float_kind(const std::string& name) {
    return name == "float32"    ? nla::FloatKind::float32
           : name == "bfloat16" ? nla::FloatKind::bfloat16
           : name == "float16"  ? nla::FloatKind::float16
                                : throw py::value_error("dtype '" + name + "' is not float32, bfloat16 or float16");
}

void encode_rows(int device, uintptr_t stream, const std::string& codec, int d, int block, int group, uintptr_t hidden,
                 const std::string& hidden_dtype, int64_t row_stride, int64_t rows, uintptr_t dest, uintptr_t codes,
                 uintptr_t scales, uintptr_t norm, float sink_norm, uintptr_t exact, uintptr_t exact_dest,
                 uintptr_t exact_count, int64_t exact_capacity) {
    nla::EncodeArgs args{};
    args.codec = codec_shape(codec, d, block, group);
    args.hidden = pointer<const void>(hidden);
    args.input = float_kind(hidden_dtype);
    args.row_stride = row_stride;
    args.rows = rows;
    args.dest = pointer<const int64_t>(dest);
    args.codes = pointer<void>(codes);
    args.scales = pointer<void>(scales);
    args.norm = pointer<float>(norm);
    args.sink_norm = sink_norm;
    args.exact = pointer<uint16_t>(exact);
    args.exact_dest = pointer<int64_t>(exact_dest);
    args.exact_count = pointer<int32_t>(exact_count);
    args.exact_capacity = exact_capacity;
    nla::encode_rows(device, stream, args);
}

void decode_rows(int device, uintptr_t stream, const std::string& codec, int d, int block, int group, uintptr_t codes,
                 uintptr_t scales, uintptr_t norm, int64_t rows, uintptr_t out, const std::string& out_dtype) {
    nla::DecodeArgs args{};
    args.codec = codec_shape(codec, d, block, group);
    args.codes = pointer<const void>(codes);
    args.scales = pointer<const void>(scales);
    args.norm = pointer<const float>(norm);
    args.rows = rows;
    args.out = pointer<void>(out);
    args.output = float_kind(out_dtype);
    nla::decode_rows(device, stream, args);
}

void peer_sum(int device, uintptr_t stream, int programs, const std::vector<uintptr_t>& memory, int rank, int64_t part,
              int64_t sum, uintptr_t x, int64_t size, const std::string& dtype, uintptr_t turn, uintptr_t stop) {
    nla::PeerSumArgs args{};
    nla::check(memory.size() <= nla::kMostRanks, "memory", "is of too many ranks");
    for (size_t i = 0; i < memory.size(); ++i) args.memory[i] = pointer<uint8_t>(memory[i]);
    args.rank = rank;
    args.ranks = static_cast<int>(memory.size());
    args.part = part;
    args.sum = sum;
    args.x = pointer<const void>(x);
    args.size = size;
    args.kind = float_kind(dtype);
    args.turn = pointer<uint32_t>(turn);
    args.stop = pointer<const uint32_t>(stop);
    nla::peer_sum(device, stream, programs, args);
}
#endif

#ifdef NLA_WITH_HOPPER
py::list gated_tiles() {
    py::list tiles;
    for (const nla::GatedTile& tile : nla::gated_tiles()) tiles.append(py::make_tuple(tile.rows, tile.width));
    return tiles;
}

void gated_linear(int device, uintptr_t stream, int64_t m, int64_t n, int64_t k, bool silu,
                  const std::pair<int, int>& tile, uintptr_t x, uintptr_t w, uintptr_t out) {
    nla::gated_linear(device, stream, {m, n, k, silu}, {tile.first, tile.second}, pointer<const void>(x),
                      pointer<const void>(w), pointer<void>(out));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    using namespace py::literals;
    py::register_exception_translator(raise_os_error);
    m.doc() = "Compiled parts of nla_engine; reach them through nla_engine.extension.";

    m.def("crc32c", &checksum, "data"_a, "portable"_a = false, "CRC-32C of a contiguous buffer.");
    m.def("fill_shard", &fill_shard, "image"_a, "chunk_bytes"_a, "chunks_per_shard"_a, "pieces"_a,
          "Copies contiguous buffers, each to its offset in a shard's data, into its image. Releases the GIL.");
    m.def("seal_shard", &seal_shard, "image"_a, "data_bytes"_a, "chunk_bytes"_a, "chunks_per_shard"_a,
          "Adds checksums and index to the image of a Zarr v3 shard (see csrc/shard.hpp); returns the file's size.");
    m.def("write_shard", &write_shard, "path"_a, "image"_a, "data_bytes"_a, "chunk_bytes"_a, "chunks_per_shard"_a,
          "seal_shard, then the file: temporary name, fsync, rename, fsync of the directory. Releases the GIL.");

    bind_matmul(m);

#ifdef NLA_WITH_CUDA
    m.attr("cuda") = true;
    m.attr("cuda_architectures") = NLA_CUDA_ARCHITECTURES;
    m.def("cuda_fault", &nla::cuda_fault, "device"_a, "Why CUDA cannot run the kernels on a device; empty if it can.");
    m.def("encode_rows", &encode_rows, "device"_a, "stream"_a, py::kw_only(), "codec"_a, "d"_a, "block"_a, "group"_a,
          "hidden"_a, "hidden_dtype"_a, "row_stride"_a, "rows"_a, "dest"_a, "codes"_a, "scales"_a, "norm"_a,
          "sink_norm"_a, "exact"_a, "exact_dest"_a, "exact_count"_a, "exact_capacity"_a,
          "One launch of the tap's encoder; addresses as integers (see csrc/encode.hpp).");
    m.def("decode_rows", &decode_rows, "device"_a, "stream"_a, py::kw_only(), "codec"_a, "d"_a, "block"_a, "group"_a,
          "codes"_a, "scales"_a, "norm"_a, "rows"_a, "out"_a, "out_dtype"_a,
          "One launch of the decoder; addresses as integers (see csrc/encode.hpp).");
    m.def("peer_sum", &peer_sum, "device"_a, "stream"_a, py::kw_only(), "programs"_a, "memory"_a, "rank"_a, "part"_a,
          "sum"_a, "x"_a, "size"_a, "dtype"_a, "turn"_a, "stop"_a,
          "One launch of a sum over ranks; addresses as integers (see csrc/peer_sum.hpp).");
#else
    m.attr("cuda") = false;
    m.attr("cuda_architectures") = "";
#endif

#ifdef NLA_WITH_HOPPER
    m.attr("gated_tiles") = gated_tiles();
    m.def("gated_linear", &gated_linear, "device"_a, "stream"_a, py::kw_only(), "m"_a, "n"_a, "k"_a, "silu"_a, "tile"_a,
          "x"_a, "w"_a, "out"_a, "One launch of the gated product; addresses as integers (see csrc/gated.hpp).");
#else
    m.attr("gated_tiles") = py::list();
#endif
}
