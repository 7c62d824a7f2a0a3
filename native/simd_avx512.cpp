// The kernels for x86-64 with AVX-512F (Skylake-X 2017, Zen 4 2022 and later).
#include <cmath>
#include <cstring>

#include "half.h"
#include "simd.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_undefined_ps: bug 105593
#endif
#include <immintrin.h>

// Only what follows may use these instructions; MSVC lets intrinsics through without being told.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma,f16c")
#endif

namespace {

struct V {
    static constexpr const char * name = "avx512";
    static constexpr int W = 16;
    using F = __m512;

    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float * p) { return _mm512_loadu_ps(p); }
    static F load(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
    static void store(float * p, F a) { _mm512_storeu_ps(p, a); }
    static void store(uint16_t * p, F a) { _mm256_storeu_si256((__m256i *) p, to_half(a)); }
    static void stream(float * p, F a) { _mm512_stream_ps(p, a); }
    static void stream(uint16_t * p, F a) { _mm256_stream_si256((__m256i *) p, to_half(a)); }
    static void fence() { _mm_sfence(); }
    static void prefetch(const float * p, size_t ahead) { _mm_prefetch((const char *) p + ahead, _MM_HINT_T0); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F madd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F swap(F a) { return _mm512_permute_ps(a, 0xb1); }
    static F exp2_bits(F n) {
        const __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(0x3f800000)));
    }

   private:
    static __m256i to_half(F a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

#include "simd_kernels.inc"

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

namespace mrrope {
extern const Kernels * const avx512_kernels = &table;
}
#endif
