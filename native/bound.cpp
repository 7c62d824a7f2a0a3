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
constexpr int FINE    = 16;  // a block's angles are sums of a multiple of FINE and one below it
constexpr int CHUNK   = 64;  // positions of a block summed together: their part of the table stays in the first cache
constexpr int ANCHORS = 8;   // anchors taken through a chunk while it is there
constexpr int PROBES  = 32;  // positions looked at one by one before a table is made

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
void make_table(const double * theta, int n, float * table) {
    const int rows = rows_of(n);
    for (int i = 0; i < n; i++) {
        Angle  fine[FINE], coarse[BLOCK / FINE];
        double fine_c[FINE], fine_s[FINE];
        make_multiples(theta[i], 1, FINE, fine);
        make_multiples(theta[i], FINE, BLOCK / FINE, coarse);
        for (int j = 0; j < FINE; j++) {
            fine_c[j] = fine[j].c;
            fine_s[j] = fine[j].s;
        }
        for (int k = 0; k < BLOCK / FINE; k++) {
            const double c = coarse[k].c, s = coarse[k].s;
            float * out = table + ((size_t) (k * FINE / CHUNK) * rows + 2 * i) * CHUNK + k * FINE % CHUNK;
            for (int j = 0; j < FINE; j++) {
                out[j]         = (float)  (c * fine_c[j] - s * fine_s[j]);
                out[CHUNK + j] = (float) -(s * fine_c[j] + c * fine_s[j]);
            }
        }
    }
}

// steps (n, ANCHORS): the angles of k*BLOCK*theta_i, by which a fresh anchor is turned to reach its neighbours
void make_steps(const double * theta, int n, Angle * steps) {
    for (int i = 0; i < n; i++) {
        make_multiples(theta[i], BLOCK, ANCHORS, steps + (size_t) i * ANCHORS);
    }
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

// What a run of sums needs: after use(theta), at(first) gives the sums of RUN positions from there on.
constexpr int RUN = ANCHORS * BLOCK;

struct Scanner {
    int                 n;
    std::vector<double> theta;
    std::vector<float>  table;
    std::vector<Angle>  steps;
    std::vector<float>  anchors;
    std::vector<float>  sums; // (RUN,)
    Multiply            product;

    explicit Scanner(int n)
        : n(n), theta(n), table((size_t) rows_of(n) * BLOCK), steps((size_t) n * ANCHORS),
          anchors((size_t) rows_of(n) * ANCHORS), sums(RUN), product(pick_multiply()) {}

    void use(const double * angles) {
        theta.assign(angles, angles + n);
        make_table(angles, n, table.data());
        make_steps(angles, n, steps.data());
    }

    const float * at(int64_t first) {
        make_anchors(theta.data(), n, steps.data(), first, anchors.data());
        product(anchors.data(), table.data(), rows_of(n), sums.data());
        return sums.data();
    }

    // The first m in first..last with a sum below 0, or 0; at most RUN positions.
    int64_t first_below(int64_t first, int64_t last) {
        const float   error = (float) bound_error(n) * 1.01f;
        const float * near  = at(first);
        for (int64_t m = first; m <= last; m++) {
            if (near[m - first] < error && bound_sum(theta.data(), n, m) < 0.0) {
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
    Scanner scanner(n);
    scanner.use(theta);
    for (int64_t done = 0; done < count; done += RUN) {
        const float * sums = scanner.at(first + done);
        std::copy(sums, sums + std::min<int64_t>(count - done, RUN), out + done);
    }
}

int64_t bound_scan(const double * theta, int n, int64_t first, int64_t last) {
    Scanner scanner(n);
    scanner.use(theta);
    for (int64_t m = first; m <= last; m += RUN) {
        const int64_t found = scanner.first_below(m, std::min<int64_t>(last, m + RUN - 1));
        if (found) {
            return found;
        }
    }
    return 0;
}

namespace {

// Whether plain cosines, each off by m*theta*2^-53 and a little more, leave no doubt that the sum is negative.
bool surely_negative(const double * theta, int n, int64_t m) {
    double sum = 0.0, angles = 0.0;
    for (int i = 0; i < n; i++) {
        sum    += std::cos((double) m * theta[i]);
        angles += (double) m * theta[i];
    }
    return sum < -(angles + n) * 0x1p-50;
}

// Whether no m in 1..n_ctx-1 has a sum below 0. From the far end, where a base too small fails most often: a few
// positions one by one, then runs.
bool reaches(Scanner & scanner, const double * theta, int64_t n_ctx) {
    int64_t end = n_ctx - 1;
    for (int64_t m = end; m >= 1 && m > end - PROBES; m--) {
        if (surely_negative(theta, scanner.n, m)) {
            return false;
        }
    }
    scanner.use(theta);
    for (; end >= 1; end -= RUN) {
        if (scanner.first_below(std::max<int64_t>(1, end - RUN + 1), end)) {
            return false;
        }
    }
    return true;
}

} // namespace

double bound_min_base(int64_t n_ctx, int n_rot, int digits) {
    std::vector<double> theta(n_rot / 2);
    Scanner scanner(n_rot / 2);
    const int64_t lowest = (int64_t) std::llround(std::pow(10.0, digits - 1));
    for (int decade = 0; decade < BOUND_MAX_DECADE; decade++) {
        for (int64_t k = decade == 0 ? lowest + 1 : lowest; k < 10 * lowest; k++) {
            const int    shift = decade - (digits - 1);
            const double ten   = std::pow(10.0, std::abs(shift));
            const double base  = shift < 0 ? k / ten : k * ten; // one rounding: the double nearest to the decimal
            for (int i = 0; i < n_rot / 2; i++) {
                theta[i] = mrrope_theta(i, n_rot, base);
            }
            if (reaches(scanner, theta.data(), n_ctx)) {
                return base;
            }
        }
    }
    return 0.0;
}

} // namespace mrrope
