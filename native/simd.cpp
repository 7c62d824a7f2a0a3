// Which kernels this CPU can run. See simd.h.
#include "simd.h"

#if defined(__x86_64__) || defined(_M_X64)
#define MRROPE_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace mrrope {

extern const Kernels * const scalar_kernels;
extern const Kernels * const avx2_kernels;
extern const Kernels * const avx512_kernels;
extern const Kernels * const neon_kernels;

namespace {

#ifdef MRROPE_X86
struct Cpuid {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Cpuid cpuid(unsigned leaf) {
    Cpuid r;
#if defined(_MSC_VER)
    int v[4];
    __cpuid(v, 0);
    if ((unsigned) v[0] >= leaf) {
        __cpuidex(v, (int) leaf, 0);
        r.a = (unsigned) v[0], r.b = (unsigned) v[1], r.c = (unsigned) v[2], r.d = (unsigned) v[3];
    }
#else
    __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
#endif
    return r;
}

// The registers that the operating system saves: bits 1-2 SSE and AVX, bits 5-7 AVX-512. XGETBV must exist.
uint64_t saved_registers() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t) high << 32 | low;
#endif
}

void add_x86_kernels(std::vector<const Kernels *> & found) {
    const Cpuid one = cpuid(1), seven = cpuid(7);
    const bool osxsave = one.c >> 27 & 1, fma = one.c >> 12 & 1, f16c = one.c >> 29 & 1;
    const bool avx2 = seven.b >> 5 & 1, avx512f = seven.b >> 16 & 1;
    const uint64_t saved = osxsave ? saved_registers() : 0;
    if (!fma || !f16c || !avx2 || (saved & 0x06) != 0x06) {
        return;
    }
    if (avx512f && (saved & 0xe0) == 0xe0) {
        found.push_back(avx512_kernels);
    }
    found.push_back(avx2_kernels);
}
#endif

std::vector<const Kernels *> detect() {
    std::vector<const Kernels *> found;
#if defined(MRROPE_X86)
    add_x86_kernels(found);
#elif defined(__aarch64__) || defined(_M_ARM64)
    found.push_back(neon_kernels);
#endif
    found.push_back(scalar_kernels);
    return found;
}

}  // namespace

const std::vector<const Kernels *> & available_kernels() {
    static const std::vector<const Kernels *> kernels = detect();
    return kernels;
}

const Kernels * find_kernels(const std::string & level) {
    for (const Kernels * kernels : available_kernels()) {
        if (level.empty() || level == kernels->name) {
            return kernels;
        }
    }
    return nullptr;
}

}  // namespace mrrope
