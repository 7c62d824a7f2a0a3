// The kernels for AArch64, where NEON and the half conversions are always there.
#include <cmath>
#include <cstring>

#include "half.h"
#include "simd.h"

#if defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>

namespace {

struct V {
    static constexpr const char * name = "neon";
    static constexpr int W = 4;
    using F = float32x4_t;

    static F set1(float x) { return vdupq_n_f32(x); }
    static F load(const float * p) { return vld1q_f32(p); }
    static F load(const uint16_t * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static void store(float * p, F a) { vst1q_f32(p, a); }
    static void store(uint16_t * p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
    template <class T>
    static void stream(T * p, F a) { store(p, a); }
    static void fence() {}
    static void prefetch(const float * p, size_t ahead) {
#if defined(_MSC_VER)
        __prefetch((const char *) p + ahead);
#else
        __builtin_prefetch((const char *) p + ahead);
#endif
    }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F madd(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F max(F a, F b) { return vmaxq_f32(a, b); }
    static F swap(F a) { return vrev64q_f32(a); }
    static F exp2_bits(F n) {
        const int32x4_t bits = vshlq_n_s32(vreinterpretq_s32_f32(n), 23);
        return vreinterpretq_f32_s32(vaddq_s32(bits, vdupq_n_s32(0x3f800000)));
    }
};

#include "simd_kernels.inc"

}  // namespace

namespace mrrope {
extern const Kernels * const neon_kernels = &table;
}
#endif
