// Rotary position embedding of query or key arrays, by the angles of a rope table.
#pragma once

#include <cstdint>
#include <vector>

#include "simd.h"

namespace mrrope {

enum class Float { f32, f16 };

// (n_tokens, n_heads, head_dim), contiguous, of one float type.
struct Shape {
    int64_t n_tokens;
    int n_heads, head_dim;
    Float type;
};

// out[t] = x[t] with pair i of every head turned by positions[t] * theta[i] radians and multiplied by attn_factor.
//
// theta has n_rot/2 <= head_dim/2 entries; dims from n_rot on are copied. x == out works in place; otherwise the two
// must not overlap. |positions[t]| <= 2^31 and |theta[i]| <= 2^20: the angle is then right to 1e-12 rad before cos and
// sin are rounded to float. Every level of Kernels gives the same bits. n_threads 0 chooses.
void rope(const void * x, void * out, const Shape & shape, const int64_t * positions, const std::vector<double> & theta,
          double attn_factor, Pairs pairs, const Kernels & kernels, int n_threads);

}  // namespace mrrope
