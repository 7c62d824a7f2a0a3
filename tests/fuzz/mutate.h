// A GGUF file taken apart for mutation: what a fuzzer cannot guess byte by byte (counts, lengths, offsets, types,
// alignment) is changed by its meaning. Nothing here is shared with the code under test.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace fuzz {

using Bytes = std::string;
using Random = std::minstd_rand;

// A metadata record as its bytes. `type` is what they say, `value` where in them what follows the type begins.
struct Record {
    Bytes raw;
    uint32_t type = 0;
    size_t value = 0;
};

struct Info {
    Bytes name;
    std::vector<uint64_t> dims;
    uint32_t type = 0;
    uint64_t offset = 0;
};

// A number in the file that others depend on: `size` bytes at `at`.
struct Field {
    size_t at, size;
};

struct File {
    uint32_t version = 3;
    std::vector<Record> kvs;
    std::vector<Info> infos;
    Bytes rest;  // what follows the last tensor info that could be read
    std::vector<Field> fields;
    bool whole = false;  // every record the counts claim was there
};

// Takes apart as much of the file as can be read. Never fails.
File parse(const uint8_t * data, size_t size);

// Puts it together: counts, offsets, padding and data as they ought to be, unless that takes more than `max` bytes of
// data, which are then left out.
Bytes build(const File & file, size_t max);

// One to four changes, of the parts or of the numbers alone.
Bytes mutate(const Bytes & data, size_t max, uint32_t seed);

// The same without knowledge of the format: bytes set, cut, doubled.
Bytes mutate_bytes(const Bytes & data, size_t max, Random & random);

}  // namespace fuzz

// For ctypes: mutates data[0, size) in place, where `max` bytes have room; returns the new size.
extern "C" size_t gguf_mutate(uint8_t * data, size_t size, size_t max, uint32_t seed);
