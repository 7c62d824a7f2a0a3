#include "mutate.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "mutate_tables.h"

namespace fuzz {
namespace {

constexpr uint32_t STRING = 8, ARRAY = 9;
constexpr uint32_t SIZES[13] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
constexpr size_t MOST = 4096;  // records and fields looked at: a fuzzer's files are small

uint64_t below(Random & random, uint64_t n) {
    const uint64_t high = random();  // a statement of its own: the order must not be the compiler's
    return n == 0 ? 0 : (high << 31 ^ random()) % n;
}

template <class T>
void insert(std::vector<T> & into, uint64_t at, const T & one) {
    into.insert(into.begin() + std::ptrdiff_t(at), one);
}

template <class T>
const T & pick(Random & random, const std::vector<T> & from) {
    return from[below(random, from.size())];
}

uint64_t nasty(Random & random, uint64_t now = 0, uint64_t size = 0) {
    switch (below(random, 8)) {
        case 0: return now + 1;
        case 1: return now - 1;
        case 2: return now ^ (1ull << below(random, 64));
        case 3: return size - below(random, 40);  // about what is left, or all there is
        case 4: return below(random, 300);
        default: return NASTY[below(random, sizeof NASTY / sizeof *NASTY)];
    }
}

uint64_t load(const uint8_t * p, size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i) {
        value |= uint64_t(p[i]) << 8 * i;
    }
    return value;
}

void put(Bytes & out, uint64_t value, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        out += char(value >> 8 * i);
    }
}

void put_string(Bytes & out, const Bytes & text) {
    put(out, text.size(), 8);
    out += text;
}

// Reads as far as the bytes go; `ok` turns false at the first thing that is not there.
class Reader {
public:
    Reader(const uint8_t * data, size_t size, File & file) : data_(data), size_(size), file_(file) {}

    void run() {
        bytes(4);
        file_.version = uint32_t(number(4));
        const uint64_t n_tensors = number(8), n_kv = number(8);
        for (uint64_t i = 0; ok_ && i < n_kv && i < MOST; ++i) {
            kv();
        }
        for (uint64_t i = 0; ok_ && i < n_tensors && i < MOST; ++i) {
            info();
        }
        file_.whole = ok_ && file_.kvs.size() == n_kv && file_.infos.size() == n_tensors;
        file_.rest.assign(reinterpret_cast<const char *>(data_) + at_, size_ - at_);
    }

private:
    void kv() {
        const size_t start = at_;
        Record record;
        text();
        record.type = uint32_t(number(4));
        record.value = at_ - start;
        value(record.type);
        if (ok_) {
            record.raw.assign(reinterpret_cast<const char *>(data_) + start, at_ - start);
            file_.kvs.push_back(record);
        } else {
            at_ = start;
        }
    }

    void value(uint32_t type) {
        uint64_t count = 1;
        if (type == ARRAY) {
            type = uint32_t(number(4));
            count = number(8);
        }
        if (type == STRING) {
            for (uint64_t i = 0; ok_ && i < count; ++i) {
                text();
            }
        } else if (type < 13 && SIZES[type] > 0 && count <= size_) {
            bytes(count * SIZES[type]);
        } else {
            ok_ = false;
        }
    }

    void info() {
        const size_t start = at_;
        Info info;
        info.name = text();
        const uint64_t n_dims = number(4);
        for (uint64_t i = 0; ok_ && i < n_dims && i < 8; ++i) {
            info.dims.push_back(number(8));
        }
        info.type = uint32_t(number(4));
        info.offset = number(8);
        if (ok_ && n_dims < 8) {
            file_.infos.push_back(info);
        } else {
            ok_ = false;
            at_ = start;
        }
    }

    Bytes text() {
        const uint64_t length = number(8);
        const uint8_t * p = bytes(length);
        return p == nullptr ? Bytes() : Bytes(reinterpret_cast<const char *>(p), size_t(length));
    }

    uint64_t number(size_t size) {
        const size_t at = at_;
        const uint8_t * p = bytes(size);
        if (p == nullptr) {
            return 0;
        }
        if (file_.fields.size() < MOST) {
            file_.fields.push_back({at, size});
        }
        return load(p, size);
    }

    const uint8_t * bytes(uint64_t n) {
        if (!ok_ || n > size_ - at_) {
            ok_ = false;
            return nullptr;
        }
        at_ += size_t(n);
        return data_ + at_ - n;
    }

    const uint8_t * data_;
    size_t size_, at_ = 0;
    File & file_;
    bool ok_ = true;
};

uint64_t alignment_of(const File & file) {
    for (const Record & record : file.kvs) {
        const Bytes key = record.raw.substr(8, 17);
        if (key == "general.alignment" && record.type == 4) {
            const uint64_t n = load(reinterpret_cast<const uint8_t *>(record.raw.data()) + record.value, 4);
            return n != 0 && n <= 1 << 20 ? n : 32;
        }
    }
    return 32;
}

// What the tensor's data take by ggml's rules; wraps as 64 bits do, which the files then say.
uint64_t bytes_of(const Info & info) {
    uint64_t n = 1;
    for (const uint64_t dim : info.dims) {
        n *= dim;
    }
    return info.type < 43 && BLOCKS[info.type][0] > 0 ? n / BLOCKS[info.type][0] * BLOCKS[info.type][1] : n;
}

Bytes random_text(Random & random) {
    static const Bytes some[] = {"a", "", Bytes("\0x", 2), "\xff\xc3\x28", "\x1b[2J", Bytes(63, 'n'), Bytes(64, 'n'),
                                 "rope_freqs.weight", "llama", "token_embd.weight"};
    return some[below(random, sizeof some / sizeof *some)];
}

void put_values(Bytes & out, uint32_t type, uint64_t count, Random & random) {
    for (uint64_t i = 0; i < count; ++i) {
        if (type == STRING) {
            put_string(out, random_text(random));
        } else {
            put(out, nasty(random), type < 13 ? SIZES[type] : 4);
        }
    }
}

// What follows a key: a type and a value of that type, now and then of a type that is none.
Record new_record(const Bytes & key, Random & random) {
    Record record;
    record.type = uint32_t(below(random, 40) == 0 ? nasty(random) : below(random, 13));
    put_string(record.raw, key);
    put(record.raw, record.type, 4);
    record.value = record.raw.size();
    if (record.type == ARRAY) {
        const auto item = uint32_t(below(random, 13));
        const uint64_t count = below(random, 6);
        put(record.raw, item, 4);
        put(record.raw, count, 8);
        put_values(record.raw, item, count, random);
    } else {
        put_values(record.raw, record.type, 1, random);
    }
    return record;
}

Bytes key_of(const Record & record) {
    return record.raw.substr(8, record.value - 12);
}

void change_kv(File & file, Random & random) {
    const size_t at = size_t(below(random, file.kvs.size() + 1));
    switch (below(random, 6)) {
        case 0: insert(file.kvs, at, new_record(KEYS[below(random, sizeof KEYS / sizeof *KEYS)], random)); return;
        case 1: insert(file.kvs, at, new_record(random_text(random), random)); return;
        default: break;
    }
    if (at == file.kvs.size()) {
        return;
    }
    Record & record = file.kvs[at];
    switch (below(random, 5)) {
        case 0: record = new_record(key_of(record), random); break;
        case 1: file.kvs.erase(file.kvs.begin() + std::ptrdiff_t(at)); break;
        case 2: file.kvs.push_back(record); break;
        case 3: std::swap(record, file.kvs[below(random, file.kvs.size())]); break;
        default: {  // the same value under another key
            Bytes raw;
            put_string(raw, random_text(random));
            const size_t value = raw.size() + 4;
            record.raw = raw + record.raw.substr(record.value - 4);
            record.value = value;
        }
    }
}

void change_alignment(File & file, Random & random) {
    Record record;
    put_string(record.raw, "general.alignment");
    record.type = 4;
    put(record.raw, 4, 4);
    record.value = record.raw.size();
    put(record.raw, below(random, 3) ? 1ull << below(random, 32) : nasty(random), 4);
    for (Record & old : file.kvs) {
        if (key_of(old) == "general.alignment") {
            old = record;
            return;
        }
    }
    insert(file.kvs, below(random, file.kvs.size() + 1), record);
}

void change_info(File & file, Random & random) {
    const size_t at = size_t(below(random, file.infos.size() + 1));
    if (at == file.infos.size()) {
        Info info;
        info.name = random_text(random);
        info.dims.assign(size_t(below(random, 5)), below(random, 40));
        insert(file.infos, below(random, at + 1), info);
        return;
    }
    Info & info = file.infos[at];
    switch (below(random, 7)) {
        case 0: info.type = uint32_t(below(random, 4) ? below(random, 43) : nasty(random, info.type)); break;
        case 1: info.dims.resize(size_t(below(random, 6)), below(random, 3) ? 1 : nasty(random)); break;
        case 2: file.infos.erase(file.infos.begin() + std::ptrdiff_t(at)); break;
        case 3: file.infos.push_back(info); break;
        case 4: std::swap(info, file.infos[below(random, file.infos.size())]); break;
        case 5: info.name = random_text(random); break;
        default:
            if (!info.dims.empty()) {
                uint64_t & dim = info.dims[below(random, info.dims.size())];
                dim = below(random, 2) ? 256 * below(random, 4) : nasty(random, dim);
            }
    }
}

// One number of the file, or the end of the file, whatever else depends on it.
void change_number(Bytes & data, const File & file, Random & random) {
    if (file.fields.empty() || below(random, 12) == 0) {
        if (below(random, 3) == 0) {
            data.append(size_t(below(random, 70)), char(below(random, 256)));
        } else {
            data.resize(file.fields.empty() ? size_t(below(random, data.size() + 1)) : pick(random, file.fields).at);
        }
        return;
    }
    const Field field = pick(random, file.fields);
    uint8_t * p = reinterpret_cast<uint8_t *>(&data[field.at]);
    Bytes value;
    put(value, nasty(random, load(p, field.size), data.size() - field.at), field.size);
    std::memcpy(p, value.data(), field.size);
}

}  // namespace

File parse(const uint8_t * data, size_t size) {
    File file;
    Reader(data, size, file).run();
    return file;
}

Bytes build(const File & file, size_t max) {
    Bytes out = "GGUF";
    put(out, file.version, 4);
    put(out, file.infos.size(), 8);
    put(out, file.kvs.size(), 8);
    for (const Record & record : file.kvs) {
        out += record.raw;
    }
    const uint64_t alignment = alignment_of(file);
    uint64_t offset = 0;
    for (const Info & info : file.infos) {
        put_string(out, info.name);
        put(out, info.dims.size(), 4);
        for (const uint64_t dim : info.dims) {
            put(out, dim, 8);
        }
        put(out, info.type, 4);
        put(out, offset, 8);
        offset += (bytes_of(info) + alignment - 1) / alignment * alignment;
    }
    if (!file.infos.empty()) {
        const uint64_t padded = (out.size() + alignment - 1) / alignment * alignment;
        if (padded <= max && offset <= max - padded) {
            out.resize(size_t(padded + offset), '\1');
        }
    }
    return out;
}

Bytes mutate_bytes(const Bytes & given, size_t max, Random & random) {
    Bytes data = given;
    const size_t at = size_t(below(random, data.size() + 1));
    const size_t n = std::min<size_t>(data.size() - at, 1 + size_t(below(random, 16)));
    switch (below(random, 5)) {
        case 0: data.erase(at, n); break;
        case 1: data.insert(at, data.substr(at, n)); break;
        case 2: data.insert(at, 1, char(below(random, 256))); break;
        default:
            if (at < data.size()) {
                data[at] = char(below(random, 2) ? below(random, 256) : uint8_t(data[at]) ^ 1u << below(random, 8));
            }
    }
    data.resize(std::min(data.size(), max));
    return data;
}

Bytes mutate(const Bytes & given, size_t max, uint32_t seed) {
    Random random(seed % 2147483646 + 1);
    Bytes data = given;
    for (uint64_t left = 1 + below(random, 4); left > 0; --left) {
        File file = parse(reinterpret_cast<const uint8_t *>(data.data()), data.size());
        switch (below(random, 8)) {
            case 0:
            case 1:
            case 2: change_number(data, file, random); continue;
            case 3: data = mutate_bytes(data, max, random); continue;
            case 4: change_alignment(file, random); break;
            case 5: change_info(file, random); break;
            case 6: file.version = uint32_t(below(random, 5) ? 2 + below(random, 2) : nasty(random)); break;
            default: change_kv(file, random);
        }
        data = build(file, max);
        if (!file.whole && below(random, 2)) {
            data += file.rest;  // what could not be read may be what matters
        }
    }
    data.resize(std::min(data.size(), max));
    return data;
}

}  // namespace fuzz

extern "C" size_t gguf_mutate(uint8_t * data, size_t size, size_t max, uint32_t seed) {
    const fuzz::Bytes out = fuzz::mutate(fuzz::Bytes(reinterpret_cast<const char *>(data), size), max, seed);
    std::memcpy(data, out.data(), out.size());
    return out.size();
}
