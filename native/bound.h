// The bound of a rope table: how far apart two tokens can be before a similar one scores below a random one.
#pragma once

#include <cstdint>

namespace mrrope {

// sum_i cos(m*theta[i]) over n angles (radians per token), in double, the products m*theta[i] exact to twice that.
double bound_sum(const double * theta, int n, int64_t m);

// The same sums for m = first, first + 1, ..., first + count - 1 into out, float32; each within bound_error(n).
void bound_sums(const double * theta, int n, int64_t first, int64_t count, float * out);
double bound_error(int n);

// The first m in first..last (first >= 1) whose sum is below 0, or 0 if there is none. Exact: see bound.cpp.
// Source: Men et al., "Base of RoPE Bounds Context Length" (arXiv 2405.14591).
int64_t bound_scan(const double * theta, int n, int64_t first, int64_t last);

// The smallest base of `digits` significant decimal digits, above 1 and below 10^BOUND_MAX_DECADE, whose plain angles
// reach n_ctx, or 0. Every such base below it is tried: reaching is not monotone in the base.
constexpr int BOUND_MAX_DECADE = 22; // powers of ten up to 10^22 are exact in double
double bound_min_base(int64_t n_ctx, int n_rot, int digits);

} // namespace mrrope
