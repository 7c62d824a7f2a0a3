// What must hold of every header the scan accepts, and of every error it gives, whatever the bytes were.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../../native/gguf_index.h"

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                             \
        }                                                                             \
    } while (false)

namespace fuzz {

inline uint64_t load(const uint8_t * p, size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i) {
        value |= uint64_t(p[i]) << 8 * i;
    }
    return value;
}

inline void check_printable(const std::string & text) {
    for (const char c : text) {
        CHECK(c >= 0x20 && c < 0x7f);
    }
}

inline void check_error(const mrrope::GgufError & e, uint64_t file_size) {
    CHECK(e.offset <= file_size);
    CHECK(!e.field.empty() && !e.what.empty() && !e.why.empty());
    for (const std::string * text : {&e.field, &e.what, &e.why, &e.fix}) {
        check_printable(*text);
        CHECK(text->size() < 1000);
    }
}

inline void check_kv(const uint8_t * data, const mrrope::GgufKV & kv) {
    CHECK(kv.key_len > 0 && load(data + kv.start, 8) == kv.key_len);
    const uint64_t type_at = kv.start + 8 + kv.key_len;
    CHECK(load(data + type_at, 4) == kv.type && kv.type < 13);
    const bool array = kv.type == 9;
    CHECK(kv.value == type_at + (array ? 16 : 4) && kv.value <= kv.end);
    CHECK(array ? load(data + type_at + 4, 4) == kv.item_type && load(data + type_at + 8, 8) == kv.count
                : kv.item_type == mrrope::GGUF_NO_ITEM && kv.count == 1);
}

// Elements and bytes by ggml's rules, and that neither wraps
inline void check_size(const mrrope::GgufTensor & t) {
    uint64_t elements = 1, bytes = 0;
    for (const uint64_t ne : t.ne) {
        CHECK(ne <= uint64_t(INT64_MAX) && !__builtin_mul_overflow(elements, ne, &elements));
    }
    const mrrope::GgmlType & type = mrrope::ggml_types[t.type];
    CHECK(t.ne[0] % type.block_size == 0);
    CHECK(!__builtin_mul_overflow(elements / type.block_size, uint64_t(type.type_size), &bytes) && bytes == t.nbytes);
}

// Records follow one another without a gap and lie in data[0, size); tensors lie in the file, in order.
inline void check_header(const uint8_t * data, uint64_t size, uint64_t file_size, const mrrope::GgufHeader & header) {
    uint64_t at = 24;
    CHECK(header.kvs.size() == load(data + 16, 8) && header.tensors.size() == load(data + 8, 8));
    for (const mrrope::GgufKV & kv : header.kvs) {
        CHECK(kv.start == at);
        CHECK(kv.end > kv.start && kv.end <= size);
        check_kv(data, kv);
        at = kv.end;
    }
    CHECK(header.infos_start == at);
    uint64_t last_end = 0;
    for (const mrrope::GgufTensor & t : header.tensors) {
        const uint64_t name = load(data + t.start, 8);
        CHECK(t.start == at && t.name_len <= name && name < 64 && t.n_dims <= 4);
        CHECK(t.end == t.start + 8 + name + 4 + 8 * t.n_dims + 12 && t.end <= size);
        check_size(t);
        CHECK(t.offset % header.alignment == 0 && t.offset >= last_end);
        CHECK(t.offset <= file_size && t.nbytes <= file_size - t.offset);
        CHECK(header.data_start <= file_size - t.offset - t.nbytes);
        last_end = t.offset + t.nbytes;
        at = t.end;
    }
    CHECK(header.infos_end == at && header.infos_end <= size);
    CHECK((header.alignment & (header.alignment - 1)) == 0 && header.alignment != 0);
    if (header.tensors.empty()) {
        CHECK(header.data_start == at);
    } else {
        CHECK(header.data_start - at < header.alignment && header.data_start % header.alignment == 0);
    }
}

}  // namespace fuzz
