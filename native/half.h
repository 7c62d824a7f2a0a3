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

// All ones where `condition`, a select by bits: of ?: GCC makes jumps, and then no vectors.
static inline uint32_t mask(bool condition) { return 0u - (uint32_t) condition; }

static inline float half_to_float(uint16_t h) {
    const uint32_t magnitude = h & 0x7fffu;
    const uint32_t bits = bits_of_float(float_from_bits(magnitude << 13) * 5.192296858534828e33f);  // 2^112: exact
    const uint32_t infinite = mask(magnitude >= 0x7c00) & 0x7f800000;  // inf and NaN
    return float_from_bits(bits | infinite | (h & 0x8000u) << 16);
}

static inline uint16_t float_to_half(float x) {
    const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff;
    const uint32_t is_tiny = mask(magnitude < 0x38800000), is_big = mask(magnitude >= 0x47800000);
    const uint32_t is_nan = mask(magnitude > 0x7f800000);
    // Under 2^-14 the half's bits are those that adding 0.5 leaves lowest, and the addition has rounded them.
    const uint32_t tiny = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t big = 0x7c00 | (is_nan & (0x200 | (magnitude >> 13 & 0x3ff)));
    const uint32_t half = (is_big & big) | (~is_big & ((is_tiny & tiny) | (~is_tiny & normal)));
    return (uint16_t) (half | (bits >> 16 & 0x8000));
}

}  // namespace mrrope
