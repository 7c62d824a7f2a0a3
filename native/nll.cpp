#include "nll.h"

#include <cmath>

#include "parallel.h"

namespace mrrope {

void nll(const float * logits, const int64_t * targets, float * out, int64_t n, size_t vocab, const Kernels & kernels,
         int n_threads) {
    const int parts = pick_threads(n_threads, n, vocab * sizeof(float));
    for_each_part(parts, n, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const float * row = logits + (size_t) i * vocab;
            float max;
            double sum;
            kernels.sum_exp(row, vocab, &max, &sum);
            out[i] = std::isinf(max) ? NAN : (float) (std::log(sum) + ((double) max - (double) row[targets[i]]));
        }
    });
}

}  // namespace mrrope
