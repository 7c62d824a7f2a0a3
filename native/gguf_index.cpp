#include "gguf_index.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "gguf_cursor.h"

namespace mrrope {

const GgmlType ggml_types[GGML_TYPES] = {
    {"f32", 1, 4},       {"f16", 1, 2},       {"q4_0", 32, 18},    {"q4_1", 32, 20},     {nullptr, 0, 0},
    {nullptr, 0, 0},     {"q5_0", 32, 22},    {"q5_1", 32, 24},    {"q8_0", 32, 34},     {"q8_1", 32, 36},
    {"q2_K", 256, 84},   {"q3_K", 256, 110},  {"q4_K", 256, 144},  {"q5_K", 256, 176},   {"q6_K", 256, 210},
    {"q8_K", 256, 292},  {"iq2_xxs", 256, 66}, {"iq2_xs", 256, 74}, {"iq3_xxs", 256, 98}, {"iq1_s", 256, 50},
    {"iq4_nl", 32, 18},  {"iq3_s", 256, 110}, {"iq2_s", 256, 82},  {"iq4_xs", 256, 136}, {"i8", 1, 1},
    {"i16", 1, 2},       {"i32", 1, 4},       {"i64", 1, 8},       {"f64", 1, 8},        {"iq1_m", 256, 56},
    {"bf16", 1, 2},      {nullptr, 0, 0},     {nullptr, 0, 0},     {nullptr, 0, 0},      {"tq1_0", 256, 54},
    {"tq2_0", 256, 66},  {nullptr, 0, 0},     {nullptr, 0, 0},     {nullptr, 0, 0},      {"mxfp4", 32, 17},
    {"nvfp4", 64, 36},   {"q1_0", 128, 18},   {"q2_0", 64, 18},
};

namespace {

constexpr uint32_t TYPE_U32 = 4, TYPE_STRING = 8, TYPE_ARRAY = 9, N_VALUE_TYPES = 13;
constexpr uint8_t VALUE_SIZE[N_VALUE_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
constexpr uint64_t MAX_ARRAY = 1ull << 30;  // ggml's limit
constexpr uint64_t MIN_KV = 14, MIN_TENSOR = 24;  // bytes of the smallest records: a one-byte key with a u8; no name, no dims
constexpr uint32_t MAX_DIMS = 4, MAX_NAME = 64;
// Below ggml's limits and far above any model's, so that a file made to keep a reader busy is refused within a second:
// records of a kind, and where the metadata must end (a vocabulary of 262144 tokens takes 6 MB).
constexpr uint64_t MAX_RECORDS = 1ull << 16, MAX_METADATA = 48ull << 20;

// x rounded up to a multiple of the power of two `alignment`; false if that does not fit 64 bits.
bool pad_up(uint64_t x, uint64_t alignment, uint64_t * out) {
    if (x > UINT64_MAX - (alignment - 1)) {
        return false;
    }
    *out = (x + alignment - 1) & ~(alignment - 1);
    return true;
}

class Scanner : GgufCursor {
public:
    Scanner(const uint8_t * data, uint64_t size, uint64_t file_size) : GgufCursor(data, size), file_size_(file_size) {}

    GgufHeader run() {
        read_preamble();
        for (uint64_t i = 0; i < n_kv_; ++i) {
            enter("kv", i);
            read_kv();
        }
        refuse_duplicates(header_.kvs, "kv", "key", [](const GgufKV & kv) { return kv.key_len; });
        find_alignment();
        header_.infos_start = at_;
        for (uint64_t i = 0; i < n_tensors_; ++i) {
            enter("tensor", i);
            read_tensor();
        }
        refuse_duplicates(header_.tensors, "tensor", "name", [](const GgufTensor & t) { return t.name_len; });
        header_.infos_end = at_;
        place_data();
        return std::move(header_);
    }

private:
    // --- the parts of a header ----------------------------------------------------------------------------------
    void read_preamble() {
        if (size_ < 4) {
            fail(0, "magic", size_ == 0 ? "the file is empty" : "this is not a GGUF file",
                 "it has " + number(size_) + " bytes, a header has at least 24");
        }
        if (std::memcmp(data_, "GGUF", 4) != 0) {
            fail(0, "magic", "this is not a GGUF file",
                 "it begins with '" + printable(data_, 4) + "', expected 'GGUF'");
        }
        at_ = 4;
        read_version();
        n_tensors_ = count("n_tensors", MIN_TENSOR);
        n_kv_ = count("n_kv", MIN_KV);
    }

    void read_version() {
        const uint32_t version = u32("version");
        const std::string why = "version " + number(version) + ", expected 2 or 3";
        if (version != 0 && (version & 0xffff) == 0) {
            fail(4, "version", "this GGUF file is big-endian", why, "convert it with gguf_convert_endian of the gguf package");
        }
        if (version == 1) {
            fail(4, "version", "GGUF version 1 is no longer read by llama.cpp", why, "get a newer conversion of the model");
        }
        if (version == 0 || version > 3) {
            fail(4, "version", "this GGUF version is unknown", why);
        }
        header_.version = version;
    }

    uint64_t count(const char * part, uint64_t min_size) {
        const uint64_t n = u64(part);
        if (n > left() / min_size) {
            fail(at_ - 8, part, "the file is too small for what it says it holds",
                 number(n) + " records claimed, room for at most " + number(left() / min_size));
        }
        if (n > MAX_RECORDS) {
            fail(at_ - 8, part, "the file says it holds more than any model", number(n) + " records, at most " + number(MAX_RECORDS));
        }
        return n;
    }

    // To be called when `part`, which began at `offset`, has been stepped over.
    void bound_metadata(uint64_t offset, const char * part) const {
        if (at_ > MAX_METADATA) {
            fail(offset, part, "the metadata is longer than any model's",
                 "it goes on past byte " + number(MAX_METADATA) + "; a vocabulary of 262144 tokens takes an eighth");
        }
    }

    void read_kv() {
        GgufKV kv{};
        kv.start = at_;
        kv.key_len = string("key");
        if (kv.key_len == 0) {
            fail(kv.start, "key", "a key is empty", "length 0, at least 1 needed");
        }
        bound_metadata(kv.start, "key");
        named(data_ + kv.start + 8, kv.key_len);
        kv.type = value_type("type");
        kv.item_type = GGUF_NO_ITEM;
        kv.count = 1;
        if (kv.type == TYPE_ARRAY) {
            read_array(kv);
        } else {
            kv.value = at_;
            skip_values(kv.type, 1);
        }
        bound_metadata(kv.value, "value");
        kv.end = at_;
        header_.kvs.push_back(kv);
    }

    uint32_t value_type(const char * part) {
        const uint32_t type = u32(part);
        if (type >= N_VALUE_TYPES) {
            fail(at_ - 4, part, "a value's type is unknown", "type " + std::to_string(int32_t(type)) + ", expected 0 to 12");
        }
        return type;
    }

    void read_array(GgufKV & kv) {
        kv.item_type = value_type("item type");
        if (kv.item_type == TYPE_ARRAY) {
            fail(at_ - 4, "item type", "an array holds arrays, which llama.cpp does not read", "item type 9, expected 0 to 8 or 10 to 12");
        }
        kv.count = u64("count");
        if (kv.count > MAX_ARRAY) {
            fail(at_ - 8, "count", "an array is longer than ggml allows",
                 number(kv.count) + " elements, at most " + number(MAX_ARRAY));
        }
        const uint64_t item_size = kv.item_type == TYPE_STRING ? 8 : VALUE_SIZE[kv.item_type];  // a string's length at least
        if (kv.count > left() / item_size) {
            fail(at_ - 8, "count", "an array runs past the end of the file",
                 number(kv.count) + " elements claimed, room for at most " + number(left() / item_size));
        }
        kv.value = at_;
        skip_values(kv.item_type, kv.count);
    }

    void skip_values(uint32_t type, uint64_t n) {
        if (type == TYPE_STRING) {
            skip_strings(n);
        } else {
            need(n * VALUE_SIZE[type], "value");  // n <= 2^30
            at_ += n * VALUE_SIZE[type];
        }
    }

    // Vocabularies have hundreds of thousands, so the sound ones are stepped over with a cursor in a register.
    void skip_strings(uint64_t n) {
        const uint8_t * p = data_ + at_;
        const uint8_t * const end = data_ + size_;
        for (uint64_t i = 0; i < n && uint64_t(p - data_) <= MAX_METADATA; ++i) {
            const uint64_t room = uint64_t(end - p);
            const uint64_t length = room >= 8 ? load_u64(p) : UINT64_MAX;
            if (room < 8 || length > room - 8 || length > GGUF_MAX_STRING) {
                at_ = uint64_t(p - data_);
                string("value");  // says what is wrong
            }
            p += 8 + length;
        }
        at_ = uint64_t(p - data_);
    }

    // The first key that reads "general.alignment" up to a NUL counts, since ggml compares keys as C strings.
    void find_alignment() {
        static const char wanted[] = "general.alignment";
        constexpr uint64_t n = sizeof(wanted) - 1;
        for (size_t i = 0; i < header_.kvs.size(); ++i) {
            const GgufKV & kv = header_.kvs[i];
            const uint8_t * key = data_ + kv.start + 8;
            if (kv.key_len >= n && std::memcmp(key, wanted, n) == 0 && (kv.key_len == n || key[n] == 0)) {
                enter("kv", i);
                named(key, kv.key_len);
                return read_alignment(kv);
            }
        }
    }

    void read_alignment(const GgufKV & kv) {
        if (kv.type != TYPE_U32) {
            fail(kv.start + 8 + kv.key_len, "type", "general.alignment has the wrong type",
                 "type " + number(kv.type) + ", expected 4 (u32)");
        }
        header_.alignment = load_u32(data_ + kv.value);
        if (header_.alignment == 0 || (header_.alignment & (header_.alignment - 1)) != 0) {
            fail(kv.value, "value", "general.alignment is not a power of two",
                 "it is " + number(header_.alignment) + ", the usual value is 32");
        }
    }

    void read_tensor() {
        GgufTensor t{};
        t.start = at_;
        read_tensor_name(t);
        const uint64_t elements = read_dims(t);
        read_tensor_type(t, elements);
        t.offset = u64("offset");
        t.end = at_;
        header_.tensors.push_back(t);
    }

    void read_tensor_name(GgufTensor & t) {
        const uint64_t length = string("name");
        const uint8_t * name = data_ + t.start + 8;
        named(name, length);
        if (length >= MAX_NAME) {
            fail(t.start, "name", "a tensor's name is too long for ggml",
                 number(length) + " bytes, at most " + number(MAX_NAME - 1));
        }
        t.name_len = uint64_t(std::find(name, name + length, 0) - name);
    }

    // Reads the shape and returns its number of elements.
    uint64_t read_dims(GgufTensor & t) {
        t.n_dims = u32("n_dims");
        if (t.n_dims > MAX_DIMS) {
            fail(at_ - 4, "n_dims", "a tensor has too many dimensions", number(t.n_dims) + ", at most " + number(MAX_DIMS));
        }
        const uint64_t start = at_;
        for (uint32_t i = 0; i < MAX_DIMS; ++i) {
            t.ne[i] = i < t.n_dims ? read_dim(i) : 1;
        }
        return count_elements(t, start);
    }

    // ggml's reader lets a zero hide an overflow of the other dimensions, but then ggml_new_tensor, which skips zeros
    // and wants less than 2^63, aborts the process.
    uint64_t count_elements(const GgufTensor & t, uint64_t dims_start) const {
        uint64_t product = t.ne[0];
        for (uint32_t i = 1; i < MAX_DIMS; ++i) {
            if (t.ne[i] > 1 && uint64_t(INT64_MAX) / t.ne[i] <= product) {
                fail(dims_start + 8 * i, "dims[" + number(i) + "]", "a tensor has too many elements",
                     number(product) + " x " + number(t.ne[i]) + ", less than 2^63-1 needed");
            }
            product *= std::max<uint64_t>(t.ne[i], 1);
        }
        return std::find(t.ne, t.ne + MAX_DIMS, 0) == t.ne + MAX_DIMS ? product : 0;
    }

    uint64_t read_dim(uint32_t i) {
        const std::string part = "dims[" + number(i) + "]";
        const uint64_t ne = u64(part.c_str());
        if (ne > uint64_t(INT64_MAX)) {
            fail(at_ - 8, part, "a tensor's dimension is negative", std::to_string(int64_t(ne)) + ", at least 0 needed");
        }
        return ne;
    }

    void read_tensor_type(GgufTensor & t, uint64_t elements) {
        t.type = u32("type");
        if (t.type >= GGML_TYPES || ggml_types[t.type].name == nullptr) {
            fail(at_ - 4, "type", "a tensor's type is unknown",
                 "type " + std::to_string(int32_t(t.type)) + ", expected one of ggml's types below " + number(GGML_TYPES),
                 "make the file again with a current quantiser, or update mrrope-gguf if the type is new");
        }
        const GgmlType & type = ggml_types[t.type];
        if (t.ne[0] % type.block_size != 0) {
            fail(at_ - 4, "type", "a tensor's rows are no whole number of blocks",
                 number(t.ne[0]) + " elements in a row, " + type.name + " has " + number(type.block_size) + " in a block");
        }
        const uint64_t blocks = elements / type.block_size;
        if (blocks > UINT64_MAX / type.type_size) {
            fail(at_ - 4, "type", "a tensor's size does not fit 64 bits",
                 number(blocks) + " blocks of " + number(type.type_size) + " bytes, at most 2^64-1 bytes");
        }
        t.nbytes = blocks * type.type_size;
    }

    // Sorting, not hashing: file bytes cannot be chosen to make it slow.
    template <class Record, class Length>
    void refuse_duplicates(const std::vector<Record> & records, const char * kind, const char * part, Length length) {
        const auto compare = [&](size_t a, size_t b) {
            const uint64_t n_a = length(records[a]), n_b = length(records[b]);
            const int order = std::memcmp(data_ + records[a].start + 8, data_ + records[b].start + 8, std::min(n_a, n_b));
            return order != 0 ? order : (n_a > n_b) - (n_a < n_b);
        };
        std::vector<size_t> order(records.size());
        std::iota(order.begin(), order.end(), size_t(0));
        std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
            const int c = compare(a, b);
            return c != 0 ? c < 0 : a < b;
        });
        for (size_t i = 1; i < order.size(); ++i) {
            if (compare(order[i - 1], order[i]) == 0) {
                fail_duplicate(kind, order[i], part, records[order[i - 1]].start, records[order[i]].start,
                               length(records[order[i]]));
            }
        }
    }

    [[noreturn]] void fail_duplicate(const char * kind, size_t index, const char * part, uint64_t first, uint64_t second,
                                     uint64_t length) {
        enter(kind, index);
        named(data_ + second + 8, length);
        fail(second, part, std::string("a ") + part + " occurs twice",
             "'" + printable(name_, length) + "' is at offset " + number(first) + " and again at " + number(second));
    }

    // Offsets are the running sum of padded sizes, and all bytes lie in the file.
    void place_data() {
        header_.data_start = header_.infos_end;
        if (header_.tensors.empty()) {
            return;
        }
        kind_ = nullptr;
        if (!pad_up(at_, header_.alignment, &header_.data_start) || header_.data_start > file_size_) {
            fail(at_, "data", "the file ends before its tensor data",
                 "data should begin at " + number(header_.data_start) + ", the file has " + number(file_size_) + " bytes");
        }
        uint64_t sum = 0;
        for (size_t i = 0; i < header_.tensors.size(); ++i) {
            enter("tensor", i);
            sum = place_tensor(header_.tensors[i], sum);
        }
    }

    // Checks one tensor whose offset should be `sum`; returns what the next one's should be.
    uint64_t place_tensor(const GgufTensor & t, uint64_t sum) {
        named(data_ + t.start + 8, t.name_len);
        if (t.offset != sum) {
            fail(t.end - 8, "offset", "a tensor is not where the one before it ends", number(t.offset) + ", expected " + number(sum));
        }
        const uint64_t room = file_size_ - header_.data_start;
        if (sum > room || t.nbytes > room - sum) {
            fail(header_.data_start + std::min(sum, room), "data", "the file ends inside a tensor's data",
                 number(t.nbytes) + " bytes needed at offset " + number(sum) + " of the data, which has " + number(room));
        }
        uint64_t padded = 0;
        if (!pad_up(t.nbytes, header_.alignment, &padded) || padded > UINT64_MAX - sum) {
            fail(t.start, "data", "the tensors' sizes do not fit 64 bits",
                 number(sum) + " + " + number(t.nbytes) + " bytes, at most 2^64-1");
        }
        return sum + padded;
    }

    uint64_t file_size_, n_tensors_ = 0, n_kv_ = 0;
    GgufHeader header_;
};

}  // namespace

GgufHeader scan_gguf(const uint8_t * data, uint64_t size, uint64_t file_size) {
    return Scanner(data, size, file_size).run();
}

}  // namespace mrrope
