// Where everything lies in a GGUF header: one bounds-checked pass, no copy, no value read that is not needed.
// Accepts what ggml's own reader and llama.cpp's loader accept and refuses what they refuse.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mrrope {

// The one thing the scan throws: the bytes are no GGUF. `field` names what stands at `offset`.
struct GgufError {
    uint64_t offset;
    std::string field, what, why, fix;  // text made of file bytes is escaped, so it is safe to print
};

constexpr uint32_t GGUF_NO_ITEM = 0xffffffff;  // item_type of a value that is not an array

// One metadata record. All positions are file offsets.
struct GgufKV {
    uint64_t start;            // its key's u64 length; the key itself follows at start + 8
    uint64_t key_len;
    uint64_t value;            // scalar: its bytes; string: its u64 length; array: the first element
    uint64_t end;
    uint64_t count;            // 1, or the array's length
    uint32_t type, item_type;  // 0..12; GGUF_NO_ITEM unless type is 9 (array)
};

// One tensor info record and the extent of its data.
struct GgufTensor {
    uint64_t start, name_len, end;  // the record; name_len stops at a NUL, as ggml's C strings do
    uint64_t offset, nbytes;        // data: offset counts from data_start
    uint64_t ne[4];
    uint32_t n_dims, type;
};

struct GgufHeader {
    uint32_t version = 0, alignment = 32;
    uint64_t infos_start = 0, infos_end = 0;  // the tensor info records
    uint64_t data_start = 0;                  // infos_end padded, or infos_end itself where there is no tensor
    std::vector<GgufKV> kvs;
    std::vector<GgufTensor> tensors;
};

// Scans the header in data[0, size). `file_size` >= size is the length of the whole file, which must hold every
// tensor's bytes (the padding after the last may be missing). Memory grows with records found, never with counts claimed.
// Throws GgufError, or std::bad_alloc.
GgufHeader scan_gguf(const uint8_t * data, uint64_t size, uint64_t file_size);

struct GgmlType {
    const char * name;               // nullptr where the number is unused
    uint32_t block_size, type_size;  // elements and bytes of a block
};
constexpr uint32_t GGML_TYPES = 43;
extern const GgmlType ggml_types[GGML_TYPES];

}  // namespace mrrope
