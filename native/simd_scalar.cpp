// The kernels for any CPU: plain C++ in short loops, which compilers turn into what the baseline has.
#include <cmath>
#include <cstring>

#include "half.h"
#include "simd.h"

namespace {

struct V {
    static constexpr const char * name = "scalar";
    static constexpr int W = 8;
    struct F { float v[W]; };

    template <class Fn>
    static F each(Fn fn) {
        F r;
        for (int i = 0; i < W; i++) {
            r.v[i] = fn(i);
        }
        return r;
    }
    static F set1(float x) { return each([&](int) { return x; }); }
    static F load(const float * p) { return each([&](int i) { return p[i]; }); }
    static F load(const uint16_t * p) { return each([&](int i) { return mrrope::half_to_float(p[i]); }); }
    static void store(float * p, F a) { memcpy(p, a.v, sizeof a.v); }
    static void store(uint16_t * p, F a) {
        for (int i = 0; i < W; i++) {
            p[i] = mrrope::float_to_half(a.v[i]);
        }
    }
    template <class T>
    static void stream(T * p, F a) { store(p, a); }
    static void fence() {}
    static void prefetch(const float *, size_t) {}
    static F add(F a, F b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
    static F sub(F a, F b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
    static F mul(F a, F b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
    static F madd(F a, F b, F c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
    static F max(F a, F b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    static F swap(F a) { return each([&](int i) { return a.v[i ^ 1]; }); }
    static F exp2_bits(F n) {
        return each([&](int i) {
            return mrrope::float_from_bits((mrrope::bits_of_float(n.v[i]) << 23) + 0x3f800000);
        });
    }
};

#include "simd_kernels.inc"

}  // namespace

namespace mrrope {
extern const Kernels * const scalar_kernels = &table;
}
