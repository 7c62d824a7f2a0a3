// The negative log likelihood of tokens under a language model's logits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace mrrope {

// out[i] = log(sum_j exp(logits[i][j])) - logits[i][targets[i]]: logits (n, vocab), targets (n,) in [0, vocab).
//
// Reads the logits once and allocates nothing. A logit of -inf is a token that cannot come: as a target it costs +inf.
// A row with a NaN, a +inf, or nothing but -inf gives NaN. n_threads 0 chooses.
void nll(const float * logits, const int64_t * targets, float * out, int64_t n, size_t vocab, const Kernels & kernels,
         int n_threads);

}  // namespace mrrope
