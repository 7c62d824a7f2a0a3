// IEEE half precision by integer arithmetic: the same values as the F16C and NEON conversions, round to nearest even.
// No branches, so that compilers can make vectors of it.
#pragma once

#include <cstdint>
#include <cstring>

namespace mrrope {

static inline float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float half_to_float(uint16_t h) {
    const uint32_t magnitude = h & 0x7fffu;
    const uint32_t bits = bits_of_float(float_from_bits(magnitude << 13) * 5.192296858534828e33f);  // 2^112: exact
    const uint32_t infinite = magnitude >= 0x7c00 ? 0x7f800000 : 0;  // inf and NaN
    return float_from_bits(bits | infinite | (h & 0x8000u) << 16);
}

static inline uint16_t float_to_half(float x) {
    const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff;
    // Under 2^-14 the half's bits are those that adding 0.5 leaves lowest, and the addition has rounded them.
    const uint32_t tiny = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00 | (magnitude >> 13 & 0x3ff) : 0x7c00;
    const uint32_t finite = magnitude < 0x38800000 ? tiny : normal;
    return (uint16_t) ((magnitude >= 0x47800000 ? infinite : finite) | (bits >> 16 & 0x8000));
}

}  // namespace mrrope
