// What was parsed is written, and what was written is parsed: the same header, byte for byte. Then once more with a
// tensor put first and records left out, as mrrope_gguf/gguf/edit.py does it (which edit_fuzz.py runs itself).
#include <utility>
#include <vector>

#include "check.h"

namespace {

using mrrope::GgufHeader;
using mrrope::GgufKV;
using mrrope::GgufTensor;
using Bytes = std::string;

constexpr uint64_t ROOM = 1ull << 62;  // tensor data are left out, so sizes may be anything
constexpr uint64_t NEW_BYTES = 100;
const Bytes NEW_NAME = "written.first";

void put(Bytes & out, uint64_t value, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        out += char(value >> 8 * i);
    }
}

uint64_t padded(uint64_t x, uint64_t alignment) {
    return (x + alignment - 1) / alignment * alignment;
}

class Writer {
public:
    Writer(const uint8_t * data, const GgufHeader & header) : data_(data), header_(header) {}

    // The header again from what the index says of it: `dropped` a bit for each of the first 64 records, `first` the
    // bytes of a new tensor before all others.
    Bytes write(uint64_t dropped, uint64_t first) {
        kept_.clear();
        for (size_t i = 0; i < header_.kvs.size(); ++i) {
            if (i >= 64 || !(dropped >> i & 1) || is_alignment(header_.kvs[i])) {
                kept_.push_back(i);
            }
        }
        Bytes out = "GGUF";
        put(out, header_.version, 4);
        put(out, header_.tensors.size() + (first > 0), 8);
        put(out, kept_.size(), 8);
        for (const size_t i : kept_) {
            kv(out, header_.kvs[i]);
        }
        uint64_t offset = 0;
        if (first > 0) {
            info(out, NEW_NAME, {first}, 24, offset);  // i8
            offset = padded(first, header_.alignment);
        }
        for (const GgufTensor & t : header_.tensors) {
            info(out, text(t.start), std::vector<uint64_t>(t.ne, t.ne + t.n_dims), t.type, offset);
            offset += padded(t.nbytes, header_.alignment);
        }
        return out;
    }

    const std::vector<size_t> & kept() const { return kept_; }

private:
    bool is_alignment(const GgufKV & kv) const { return text(kv.start).compare(0, 17, "general.alignment") == 0; }

    Bytes text(uint64_t at) const {
        return Bytes(reinterpret_cast<const char *>(data_) + at + 8, size_t(fuzz::load(data_ + at, 8)));
    }

    void put_text(Bytes & out, const Bytes & what) {
        put(out, what.size(), 8);
        out += what;
    }

    void kv(Bytes & out, const GgufKV & kv) {
        put_text(out, text(kv.start));
        put(out, kv.type, 4);
        const bool array = kv.type == 9;
        if (array) {
            put(out, kv.item_type, 4);
            put(out, kv.count, 8);
        }
        if ((array ? kv.item_type : kv.type) != 8) {
            out.append(reinterpret_cast<const char *>(data_) + kv.value, size_t(kv.end - kv.value));
            return;
        }
        uint64_t at = kv.value;
        for (uint64_t i = 0; i < kv.count; ++i) {
            put_text(out, text(at));
            at += 8 + text(at).size();
        }
        CHECK(at == kv.end);
    }

    void info(Bytes & out, const Bytes & name, const std::vector<uint64_t> & dims, uint32_t type, uint64_t offset) {
        put_text(out, name);
        put(out, dims.size(), 4);
        for (const uint64_t dim : dims) {
            put(out, dim, 8);
        }
        put(out, type, 4);
        put(out, offset, 8);
    }

    const uint8_t * data_;
    const GgufHeader & header_;
    std::vector<size_t> kept_;
};

const uint8_t * bytes(const Bytes & text) {
    return reinterpret_cast<const uint8_t *>(text.data());
}

void check_same_kv(const uint8_t * a, const GgufKV & x, const uint8_t * b, const GgufKV & y) {
    CHECK(x.end - x.start == y.end - y.start && x.type == y.type && x.item_type == y.item_type && x.count == y.count);
    CHECK(std::memcmp(a + x.start, b + y.start, size_t(x.end - x.start)) == 0);
}

void check_same_tensor(const GgufTensor & x, const GgufTensor & y, uint64_t shift) {
    CHECK(x.type == y.type && x.n_dims == y.n_dims && x.nbytes == y.nbytes && x.name_len == y.name_len);
    CHECK(std::memcmp(x.ne, y.ne, sizeof x.ne) == 0 && x.offset + shift == y.offset);
}

void check_edit(const uint8_t * data, const GgufHeader & header, Writer & writer, uint64_t dropped) {
    const Bytes edited = writer.write(dropped, NEW_BYTES);
    const uint64_t shift = padded(NEW_BYTES, header.alignment);
    GgufHeader found;
    try {
        found = mrrope::scan_gguf(bytes(edited), edited.size(), ROOM + (1ull << 40));
    } catch (const mrrope::GgufError & e) {
        CHECK(e.what == "a name occurs twice");  // the file holds the new tensor's name already
        return;
    }
    fuzz::check_header(bytes(edited), edited.size(), ROOM + (1ull << 40), found);
    CHECK(found.kvs.size() == writer.kept().size() && found.tensors.size() == header.tensors.size() + 1);
    for (size_t i = 0; i < found.kvs.size(); ++i) {
        check_same_kv(data, header.kvs[writer.kept()[i]], bytes(edited), found.kvs[i]);
    }
    CHECK(found.alignment == header.alignment && found.tensors[0].nbytes == NEW_BYTES && found.tensors[0].offset == 0);
    for (size_t i = 0; i < header.tensors.size(); ++i) {
        check_same_tensor(header.tensors[i], found.tensors[i + 1], shift);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    GgufHeader header;
    try {
        header = mrrope::scan_gguf(data, size, ROOM);
    } catch (const mrrope::GgufError &) {
        return 0;
    }
    Writer writer(data, header);
    const Bytes same = writer.write(0, 0);
    CHECK(same.size() == header.infos_end && std::memcmp(same.data(), data, same.size()) == 0);
    uint64_t dropped = 0xcbf29ce484222325u;  // which records go is decided by a hash of the file
    for (size_t i = 0; i < size; ++i) {
        dropped = (dropped ^ data[i]) * 0x100000001b3u;
    }
    check_edit(data, header, writer, dropped);
    check_edit(data, header, writer, 0);
    return 0;
}
