#include "crc32c.hpp"

#include <array>
#include <cstring>

namespace nla {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // Castagnoli, bits reversed

// The register after one more bit of zeros.
constexpr uint32_t next_bit(uint32_t crc) { return (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0); }

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: the register after byte b and k more zero bytes (slicing by 8).
constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = next_bit(crc);
        tables[0][byte] = crc;
    }
    for (int k = 1; k < 8; ++k)
        for (int byte = 0; byte < 256; ++byte)
            tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 0xff];
    return tables;
}

constexpr Tables kTables = make_tables();

uint32_t update_portable(uint32_t crc, const uint8_t* p, size_t size) {
    for (; size >= 8; size -= 8, p += 8) {
        const uint32_t low = crc ^ (p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24);
        crc = kTables[7][low & 0xff] ^ kTables[6][low >> 8 & 0xff] ^ kTables[5][low >> 16 & 0xff] ^
              kTables[4][low >> 24] ^ kTables[3][p[4]] ^ kTables[2][p[5]] ^ kTables[1][p[6]] ^ kTables[0][p[7]];
    }
    for (; size; --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *p++) & 0xff];
    return crc;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define NLA_CRC32C_X86 1

// The instruction takes 3 cycles and one can start per cycle, so three lanes run in parallel and are joined afterwards.
constexpr size_t kLane = 2048;

// shift[k][b]: the register whose byte k was b, after kLane more zero bytes (the register is linear in its bits).
using Shift = std::array<std::array<uint32_t, 256>, 4>;

Shift make_shift() {
    std::array<uint32_t, 32> column{};
    for (int bit = 0; bit < 32; ++bit) {
        uint32_t crc = 1u << bit;
        for (size_t step = 0; step < kLane; ++step) crc = (crc >> 8) ^ kTables[0][crc & 0xff];
        column[bit] = crc;
    }
    Shift shift{};
    for (int k = 0; k < 4; ++k)
        for (int byte = 0; byte < 256; ++byte)
            for (int bit = 0; bit < 8; ++bit)
                if (byte >> bit & 1) shift[k][byte] ^= column[8 * k + bit];
    return shift;
}

uint32_t shifted(const Shift& shift, uint32_t crc) {
    return shift[0][crc & 0xff] ^ shift[1][crc >> 8 & 0xff] ^ shift[2][crc >> 16 & 0xff] ^ shift[3][crc >> 24];
}

uint64_t word(const uint8_t* p) {
    uint64_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

__attribute__((target("sse4.2"))) uint32_t update_hardware(uint32_t crc, const uint8_t* p, size_t size) {
    static const Shift shift = make_shift();
    for (; size >= 3 * kLane; size -= 3 * kLane, p += 3 * kLane) {
        uint64_t a = crc, b = 0, c = 0;
        for (size_t i = 0; i < kLane; i += 8) {
            a = __builtin_ia32_crc32di(a, word(p + i));
            b = __builtin_ia32_crc32di(b, word(p + kLane + i));
            c = __builtin_ia32_crc32di(c, word(p + 2 * kLane + i));
        }
        crc = shifted(shift, static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
        crc = shifted(shift, crc) ^ static_cast<uint32_t>(c);
    }
    uint64_t rest = crc;
    for (; size >= 8; size -= 8, p += 8) rest = __builtin_ia32_crc32di(rest, word(p));
    crc = static_cast<uint32_t>(rest);
    for (; size; --size) crc = __builtin_ia32_crc32qi(crc, *p++);
    return crc;
}
#endif

}  // namespace

uint32_t crc32c_portable(const void* data, size_t size) {
    return ~update_portable(~0u, static_cast<const uint8_t*>(data), size);
}

uint32_t crc32c(const void* data, size_t size) {
#ifdef NLA_CRC32C_X86
    static const bool has_hardware = __builtin_cpu_supports("sse4.2");
    if (has_hardware) return ~update_hardware(~0u, static_cast<const uint8_t*>(data), size);
#endif
    return crc32c_portable(data, size);
}

}  // namespace nla
