// cos((a+j)*theta) = cos(a*theta)*cos(j*theta) - sin(a*theta)*sin(j*theta): with the right side's j-parts in a table,
// the sums over a block of positions are a small matrix product (anchors, 2n) @ (2n, BLOCK), done in float32.
// Anchors are computed afresh in double, so no error grows with m. A float32 sum is off by at most bound_error(n);
// wherever it does not clear that, the position is evaluated again in double.

#include "bound.h"

#include "mrrope.h"

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#define BOUND_X86 1
#else
#define BOUND_X86 0
#endif

#if defined(__GNUC__)
#define BOUND_INLINE inline __attribute__((always_inline))
#else
#define BOUND_INLINE inline
#endif

namespace mrrope {
namespace {

constexpr int BLOCK   = 256; // positions one anchor serves
constexpr int CHUNK   = 64;  // positions of a block summed together: their part of the table stays in the first cache
constexpr int ANCHORS = 8;   // anchors taken through a chunk while it is there

struct Angle {
    double c, s;
};

Angle add(Angle a, Angle b) {
    return { a.c * b.c - a.s * b.s, a.s * b.c + a.c * b.s };
}

// cos and sin of m*theta, as if the product had twice the digits: hi + lo = m*theta exactly
Angle angle_of(double theta, int64_t m) {
    const double x  = (double) m;
    const double hi = x * theta;
    const double lo = std::fma(x, theta, -hi);
    return add({ std::cos(hi), std::sin(hi) }, { std::cos(lo), std::sin(lo) });
}

// out[k] = the angle of k*step*theta, k = 0..count-1; a few dozen additions in double lose nothing float32 can see
void make_multiples(double theta, int64_t step, int count, Angle * out) {
    const Angle one = angle_of(theta, step);
    out[0] = { 1.0, 0.0 };
    for (int k = 1; k < count; k++) {
        out[k] = add(out[k - 1], one);
    }
}

// Rows are taken four at a time: pad n to an even number of pairs, the odd one with zeros.
int rows_of(int n) {
    return 2 * (n + n % 2);
}

// table (BLOCK/CHUNK, rows, CHUNK): rows 2i and 2i+1 hold cos(j*theta_i) and -sin(j*theta_i), j = 0..BLOCK-1
std::vector<float> make_table(const double * theta, int n) {
    const int rows = rows_of(n);
    std::vector<float> table((size_t) rows * BLOCK);
    for (int i = 0; i < n; i++) {
        Angle fine[16], coarse[BLOCK / 16];
        make_multiples(theta[i], 1, 16, fine);
        make_multiples(theta[i], 16, BLOCK / 16, coarse);
        for (int j = 0; j < BLOCK; j++) {
            const Angle a = add(coarse[j / 16], fine[j % 16]);
            float * out = table.data() + ((size_t) (j / CHUNK) * rows + 2 * i) * CHUNK + j % CHUNK;
            out[0]     = (float) a.c;
            out[CHUNK] = (float) -a.s;
        }
    }
    return table;
}

// steps (n, ANCHORS): the angles of k*BLOCK*theta_i, by which a fresh anchor is turned to reach its neighbours
std::vector<Angle> make_steps(const double * theta, int n) {
    std::vector<Angle> steps((size_t) n * ANCHORS);
    for (int i = 0; i < n; i++) {
        make_multiples(theta[i], BLOCK, ANCHORS, steps.data() + (size_t) i * ANCHORS);
    }
    return steps;
}

// anchors (ANCHORS, rows): columns 2i and 2i+1 hold cos and sin of (first + k*BLOCK)*theta_i
void make_anchors(const double * theta, int n, const Angle * steps, int64_t first, float * anchors) {
    const int rows = rows_of(n);
    for (int i = 0; i < n; i++) {
        const Angle start = angle_of(theta[i], first);
        for (int k = 0; k < ANCHORS; k++) {
            const Angle a = add(start, steps[(size_t) i * ANCHORS + k]);
            anchors[(size_t) k * rows + 2 * i]     = (float) a.c;
            anchors[(size_t) k * rows + 2 * i + 1] = (float) a.s;
        }
    }
}

// anchors (ANCHORS, rows) @ table -> sums (ANCHORS, BLOCK)
BOUND_INLINE void multiply(const float * anchors, const float * table, int rows, float * sums) {
    for (int c = 0; c < BLOCK / CHUNK; c++) {
        for (int k = 0; k < ANCHORS; k++) {
            float acc[CHUNK] = {};
            for (int r = 0; r < rows; r += 4) {
                const float * a = anchors + (size_t) k * rows + r;
                const float * t = table + ((size_t) c * rows + r) * CHUNK;
                for (int j = 0; j < CHUNK; j++) {
                    acc[j] += (a[0] * t[j] + a[1] * t[CHUNK + j]) + (a[2] * t[2 * CHUNK + j] + a[3] * t[3 * CHUNK + j]);
                }
            }
            std::copy(acc, acc + CHUNK, sums + k * BLOCK + c * CHUNK);
        }
    }
}

using Multiply = void (*)(const float *, const float *, int, float *);

void multiply_plain(const float * a, const float * t, int rows, float * sums) {
    multiply(a, t, rows, sums);
}

#if BOUND_X86
__attribute__((target("avx2,fma"))) void multiply_avx2(const float * a, const float * t, int rows, float * sums) {
    multiply(a, t, rows, sums);
}
#endif

Multiply pick_multiply() {
#if BOUND_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return multiply_avx2;
    }
#endif
    return multiply_plain;
}

// What a run of sums needs: made once, then at(first) gives the sums of RUN positions from there on.
constexpr int RUN = ANCHORS * BLOCK;

struct Scanner {
    const double *     theta;
    int                n;
    std::vector<float> table;
    std::vector<Angle> steps;
    std::vector<float> anchors;
    std::vector<float> sums; // (RUN,)
    Multiply           product;

    Scanner(const double * theta, int n)
        : theta(theta), n(n), table(make_table(theta, n)), steps(make_steps(theta, n)),
          anchors((size_t) rows_of(n) * ANCHORS), sums(RUN), product(pick_multiply()) {}

    const float * at(int64_t first) {
        make_anchors(theta, n, steps.data(), first, anchors.data());
        product(anchors.data(), table.data(), rows_of(n), sums.data());
        return sums.data();
    }

    // The first m in first..last with a sum below 0, or 0; at most RUN positions.
    int64_t first_below(int64_t first, int64_t last) {
        const float   error = (float) bound_error(n) * 1.01f;
        const float * near  = at(first);
        for (int64_t m = first; m <= last; m++) {
            if (near[m - first] < error && bound_sum(theta, n, m) < 0.0) {
                return m;
            }
        }
        return 0;
    }
};

} // namespace

double bound_sum(const double * theta, int n, int64_t m) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) {
        sum += angle_of(theta[i], m).c;
    }
    return sum;
}

// (2n + 4) roundings of 2^-24 on terms that add up to n at most, for |cos a cos b| + |sin a sin b| <= 1
double bound_error(int n) {
    return (2.0 * n + 4.0) * n * 0x1p-24 * 1.01;
}

void bound_sums(const double * theta, int n, int64_t first, int64_t count, float * out) {
    Scanner scanner(theta, n);
    for (int64_t done = 0; done < count; done += RUN) {
        const float * sums = scanner.at(first + done);
        std::copy(sums, sums + std::min<int64_t>(count - done, RUN), out + done);
    }
}

int64_t bound_scan(const double * theta, int n, int64_t first, int64_t last) {
    Scanner scanner(theta, n);
    for (int64_t m = first; m <= last; m += RUN) {
        const int64_t found = scanner.first_below(m, std::min<int64_t>(last, m + RUN - 1));
        if (found) {
            return found;
        }
    }
    return 0;
}

// From the far end, where a base too small fails first and most often: a few positions alone, then runs.
bool bound_reaches(const double * theta, int n, int64_t n_ctx) {
    int64_t last = n_ctx - 1;
    for (int k = 0; k < 32 && last >= 1; k++, last--) {
        if (bound_sum(theta, n, last) < 0.0) {
            return false;
        }
    }
    Scanner scanner(theta, n);
    for (; last >= 1; last -= RUN) {
        if (scanner.first_below(std::max<int64_t>(1, last - RUN + 1), last)) {
            return false;
        }
    }
    return true;
}

double bound_min_base(int64_t n_ctx, int n_rot, int digits) {
    std::vector<double> theta(n_rot / 2);
    const int64_t lowest = (int64_t) std::llround(std::pow(10.0, digits - 1));
    for (int decade = 0; decade < BOUND_MAX_DECADE; decade++) {
        for (int64_t k = decade == 0 ? lowest + 1 : lowest; k < 10 * lowest; k++) {
            const int    shift = decade - (digits - 1);
            const double ten   = std::pow(10.0, std::abs(shift));
            const double base  = shift < 0 ? k / ten : k * ten; // one rounding: the double nearest to the decimal
            for (int i = 0; i < n_rot / 2; i++) {
                theta[i] = mrrope_theta(i, n_rot, base);
            }
            if (bound_reaches(theta.data(), n_rot / 2, n_ctx)) {
                return base;
            }
        }
    }
    return 0.0;
}

} // namespace mrrope
