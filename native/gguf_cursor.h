// Reads a GGUF header piece by piece: every length is checked against the bytes that are left, and what is wrong is
// reported with its offset and the record it stands in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "gguf_index.h"

namespace mrrope {

constexpr uint64_t GGUF_MAX_STRING = 1ull << 30;  // ggml's limit

// The first 80 bytes of a name from the file, fit to print on a terminal.
inline std::string printable(const uint8_t * text, uint64_t length) {
    static const char hex[] = "0123456789abcdef";
    std::string out;
    for (uint64_t i = 0; i < std::min<uint64_t>(length, 80); ++i) {
        const uint8_t c = text[i];
        if (c >= 0x20 && c < 0x7f) {
            out += char(c);
        } else {
            out += {'\\', 'x', hex[c >> 4], hex[c & 15]};
        }
    }
    return length > 80 ? out + "..." : out;
}

// Little-endian whatever the host; compilers make one load of it.
inline uint32_t load_u32(const uint8_t * p) {
    return uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
}

inline uint64_t load_u64(const uint8_t * p) {
    return load_u32(p) | uint64_t(load_u32(p + 4)) << 32;
}

inline std::string number(uint64_t value) {
    return std::to_string(value);
}

class GgufCursor {
protected:
    GgufCursor(const uint8_t * data, uint64_t size) : data_(data), size_(size) {}

    // --- errors -------------------------------------------------------------------------------------------------
    void enter(const char * kind, uint64_t index) {
        kind_ = kind;
        record_ = index;
        name_ = nullptr;
    }

    void named(const uint8_t * name, uint64_t length) {
        name_ = name;
        name_length_ = length;
    }

    // "version", "kv[3].key" or "tensor[2].dims[1] (blk.0.attn_q.weight)"
    std::string field(const std::string & part) const {
        if (kind_ == nullptr) {
            return part;
        }
        std::string out = std::string(kind_) + "[" + number(record_) + "]." + part;
        return name_ == nullptr ? out : out + " (" + printable(name_, name_length_) + ")";
    }

    [[noreturn]] void fail(uint64_t offset, const std::string & part, const std::string & what, const std::string & why,
                           const std::string & fix = "") const {
        throw GgufError{offset, field(part), what, why, fix};
    }

    // --- reading ------------------------------------------------------------------------------------------------
    uint64_t left() const { return size_ - at_; }

    void need(uint64_t n, const char * part) const {
        if (n > left()) {
            fail(at_, part, "the file ends too early", number(n) + " bytes needed, " + number(left()) + " left");
        }
    }

    uint32_t u32(const char * part) {
        need(4, part);
        at_ += 4;
        return load_u32(data_ + at_ - 4);
    }

    uint64_t u64(const char * part) {
        need(8, part);
        at_ += 8;
        return load_u64(data_ + at_ - 8);
    }

    // Steps over a string's length and bytes; returns the length.
    uint64_t string(const char * part) {
        const uint64_t start = at_;
        const uint64_t length = u64(part);
        if (length > GGUF_MAX_STRING) {
            fail(start, part, "a string is longer than ggml allows",
                 number(length) + " bytes, at most " + number(GGUF_MAX_STRING));
        }
        if (length > left()) {
            fail(start, part, "a string runs past the end of the file",
                 number(length) + " bytes claimed, " + number(left()) + " left");
        }
        at_ += length;
        return length;
    }

    const uint8_t * data_;
    uint64_t size_, at_ = 0;
    const char * kind_ = nullptr;  // the record being read, for errors; null outside records
    uint64_t record_ = 0, name_length_ = 0;
    const uint8_t * name_ = nullptr;
};

}  // namespace mrrope
