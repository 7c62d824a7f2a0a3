#include "rope.h"

#include <cmath>
#include <cstring>
#include <new>

#include "parallel.h"

namespace mrrope {

namespace {

// Angles in turns, as hi + lo. hi keeps 21 significant bits, so that position * hi, with |position| <= 2^31, is exact
// in a double and whole turns can be taken off without loss.
struct Turns {
    std::vector<double> hi, lo;
};

Turns to_turns(const std::vector<double> & theta) {
    const double per_radian = 0.15915494309189535, per_radian_rest = -9.839338337591243e-18;  // 1 / 2 pi in two parts
    Turns turns;
    for (const double angle : theta) {
        const double product = angle * per_radian;
        const double rest = std::fma(angle, per_radian, -product) + angle * per_radian_rest;
        uint64_t bits;
        memcpy(&bits, &product, sizeof bits);
        bits &= ~(uint64_t) 0xffffffff;
        double hi;
        memcpy(&hi, &bits, sizeof hi);
        turns.hi.push_back(hi);
        turns.lo.push_back((product - hi) + rest);
    }
    return turns;
}

// Writing around the cache saves reading `out` first, a third of the traffic. It pays where out would not stay in the
// cache anyway, and needs every vector of it aligned.
bool should_stream(const RopeJob & job, const Shape & shape) {
    const size_t line = 64, size = shape.type == Float::f32 ? 4 : 2;
    const size_t head = size * (size_t) shape.head_dim, half = size * (size_t) job.n_rot / 2;
    const double bytes = (double) shape.n_tokens * shape.n_heads * (double) head;
    const bool aligned = (uintptr_t) job.out % line == 0 && head % line == 0 &&
                         (job.pairs == Pairs::norm || half % line == 0);
    return job.out != job.x && aligned && bytes >= 16e6;
}

}  // namespace

void rope(const void * x, void * out, const Shape & shape, const int64_t * positions, const std::vector<double> & theta,
          double attn_factor, Pairs pairs, const Kernels & kernels, int n_threads) {
    const Turns turns = to_turns(theta);
    RopeJob job = {x, out, positions, turns.hi.data(), turns.lo.data(), attn_factor, shape.n_heads, shape.head_dim,
                   2 * (int) theta.size(), pairs, false};
    job.stream = should_stream(job, shape);
    const size_t row = (size_t) shape.n_heads * (size_t) shape.head_dim * 4;
    const int n = pick_threads(n_threads, shape.n_tokens, row);
    const size_t line = 16, scratch_size = (3 * (size_t) job.n_rot + line - 1) / line * line;  // in floats
    if (scratch_size > (SIZE_MAX / sizeof(float) - line) / (size_t) n) {  // 32 bits, many threads, a head of millions
        throw std::bad_alloc();
    }
    std::vector<float> buffer((size_t) n * scratch_size + line);
    float * scratch = buffer.data() + (line - (uintptr_t) buffer.data() / sizeof(float) % line);
    const auto kernel = shape.type == Float::f32 ? kernels.rope_f32 : kernels.rope_f16;
    for_each_part(n, shape.n_tokens, [&](int thread, int64_t begin, int64_t end) {
        kernel(job, begin, end, scratch + (size_t) thread * scratch_size);
    });
}

}  // namespace mrrope
