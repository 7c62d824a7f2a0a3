// What mutations put into files: numbers that have broken readers, keys that mean something, ggml's tensor types.
#pragma once

#include <cstdint>

namespace fuzz {

const uint64_t NASTY[] = {
    0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 1000, 4096, 65535, 65536,
    1ull << 20, (1ull << 30) - 1, 1ull << 30, (1ull << 30) + 1, (1ull << 31) - 1, 1ull << 31, (1ull << 32) - 1,
    1ull << 32, (1ull << 32) + 1, 1ull << 40, 1ull << 61, (1ull << 61) + 1, 1ull << 62, (1ull << 63) - 32,
    (1ull << 63) - 1, 1ull << 63, (1ull << 63) + 1, UINT64_MAX / 88 + 1, UINT64_MAX / 344 + 1, UINT64_MAX - 31,
    UINT64_MAX - 7, UINT64_MAX - 1, UINT64_MAX,
};
const char * const KEYS[] = {
    "general.alignment", "general.architecture", "general.name", "llama.context_length", "llama.block_count",
    "llama.embedding_length", "llama.attention.head_count", "llama.rope.dimension_count", "llama.rope.freq_base",
    "llama.rope.scaling.type", "llama.rope.scaling.mrrope.version", "split.count", "split.no", "general.tags", "k", "",
    "tokenizer.ggml.tokens", "general.alignments", "llama.rope.scaling.mrrope.undo",
};
// elements and bytes of a block by tensor type, as ggml has them; 0 where there is none
constexpr uint32_t BLOCKS[43][2] = {
    {1, 4},     {1, 2},    {32, 18},   {32, 20},   {0, 0},     {0, 0},    {32, 22},   {32, 24},   {32, 34},
    {32, 36},   {256, 84}, {256, 110}, {256, 144}, {256, 176}, {256, 210}, {256, 292}, {256, 66}, {256, 74},
    {256, 98},  {256, 50}, {32, 18},   {256, 110}, {256, 82},  {256, 136}, {1, 1},     {1, 2},    {1, 4},
    {1, 8},     {1, 8},    {256, 56},  {1, 2},     {0, 0},     {0, 0},     {0, 0},     {256, 54}, {256, 66},
    {0, 0},     {0, 0},    {0, 0},     {32, 17},   {64, 36},   {128, 18},  {64, 18},
};

}  // namespace fuzz
