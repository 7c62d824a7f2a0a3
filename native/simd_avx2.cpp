// The kernels for x86-64 with AVX2, FMA and F16C (Haswell 2013, Zen 2017 and later).
#include <cmath>
#include <cstring>

#include "half.h"
#include "simd.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

// Only what follows may use these instructions; MSVC lets intrinsics through without being told.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

struct V {
    static constexpr const char * name = "avx2";
    static constexpr int W = 8;
    using F = __m256;

    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float * p) { return _mm256_loadu_ps(p); }
    static F load(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
    static void store(float * p, F a) { _mm256_storeu_ps(p, a); }
    static void store(uint16_t * p, F a) { _mm_storeu_si128((__m128i *) p, to_half(a)); }
    static void stream(float * p, F a) { _mm256_stream_ps(p, a); }
    static void stream(uint16_t * p, F a) { _mm_stream_si128((__m128i *) p, to_half(a)); }
    static void fence() { _mm_sfence(); }
    static void prefetch(const float * p, size_t ahead) { _mm_prefetch((const char *) p + ahead, _MM_HINT_T0); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F madd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F swap(F a) { return _mm256_permute_ps(a, 0xb1); }
    static F exp2_bits(F n) {
        const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(0x3f800000)));
    }

   private:
    static __m128i to_half(F a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

#include "simd_kernels.inc"

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

namespace mrrope {
extern const Kernels * const avx2_kernels = &table;
}
#endif
