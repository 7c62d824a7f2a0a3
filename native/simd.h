// The vector kernels of rope and nll, chosen at run time among the instruction sets this CPU has.
//
// simd_kernels.inc is the one source. simd_<level>.cpp compiles it for one level and exports a Kernels table;
// simd.cpp lists the tables that this CPU can run, best first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mrrope {

enum class Pairs { norm, neox };  // pair i is dims (2i, 2i+1), or dims (i, i + n_rot/2)

// One call of rope: every field is shared by all tokens.
struct RopeJob {
    const void * x;             // (n_tokens, n_heads, head_dim), contiguous
    void * out;                 // the same shape; x itself when in place, else no overlap
    const int64_t * positions;  // (n_tokens,), |position| <= 2^31
    const double * turns_hi;    // (n_rot/2,) turns per token, 21 significant bits: position * turns_hi is exact
    const double * turns_lo;    // (n_rot/2,) what turns_hi left out
    double attn_factor;         // multiplies cos and sin
    int n_heads, head_dim, n_rot;
    Pairs pairs;
    bool stream;                // write around the cache: out is far larger than it, and 64-byte aligned
};

struct Kernels {
    const char * name;
    // Rotates tokens [begin, end); scratch holds 3 * n_rot floats.
    void (*rope_f32)(const RopeJob & job, int64_t begin, int64_t end, float * scratch);
    void (*rope_f16)(const RopeJob & job, int64_t begin, int64_t end, float * scratch);
    // The largest of x[0..n) and sum(exp(x - max)). A NaN or +inf among them makes the sum NaN.
    void (*sum_exp)(const float * x, size_t n, float * max, double * sum);
};

// The levels this CPU can run, best first; "scalar" is always the last.
const std::vector<const Kernels *> & available_kernels();

// The kernels of one level, or the best for an empty name; nullptr if this CPU or this build has no such level.
const Kernels * find_kernels(const std::string & level);

}  // namespace mrrope
