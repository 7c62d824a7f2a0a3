// mrrope.h: rope tables, how much slower each rotary pair must turn for a longer context (MrRoPE, arXiv 2601.22181).
//
// C++17 and the standard library only, no state, no allocation, no exceptions: copy this file anywhere.
// Pair i of n_rot/2 turns by theta_i = freq_base^(-2i/n_rot) per token; a table divides theta_i by factors[i].
// A position is a number whose digit d carries into digit d+1; its radix grows by radix[d], hence
//     factors[i] = lead * radix[0] * ... * radix[i-1]        (the last radix has no pair to act on and is 1)
// Arrays are n_rot/2 doubles. Functions return an mrrope_status; on error the outputs are undefined.

#pragma once

#include <cmath>
#include <cstdint>

enum mrrope_method {
    MRROPE_METHOD_NONE       = 0,
    MRROPE_METHOD_LINEAR     = 1, // position interpolation: every factor S
    MRROPE_METHOD_NTK        = 2, // every radix S^(1/(n_rot/2 - 1))
    MRROPE_METHOD_YARN       = 3, // ramp linear in the pair's index, as llama.cpp's YaRN
    MRROPE_METHOD_YARN_TURNS = 4, // ramp linear in the pair's turns (NTK-by-parts)
    MRROPE_METHOD_UNI        = 5, // radix S^(1/n) across the band
    MRROPE_METHOD_PRO        = 6, // radix S^(2k/(n(n+1))) at the band's k-th digit
    MRROPE_METHOD_LLAMA3     = 7, // YARN_TURNS with 4 and 1 turns and no temperature
    MRROPE_METHOD_CUSTOM     = 8, // radix and lead are given
    MRROPE_METHOD_COUNT      = 9,
};

enum mrrope_status {
    MRROPE_OK                = 0,
    MRROPE_ERR_METHOD        = 1,
    MRROPE_ERR_N_ROT         = 2,
    MRROPE_ERR_FREQ_BASE     = 3,
    MRROPE_ERR_N_CTX_ORIG    = 4,
    MRROPE_ERR_SCALE         = 5,
    MRROPE_ERR_BETA          = 6,
    MRROPE_ERR_BASE_FACTORS  = 7,
    MRROPE_ERR_RADIX         = 8,
};

struct mrrope_params {
    int            method;       // mrrope_method
    int            n_rot;        // rotated dimensions of a head, even
    double         freq_base;
    int64_t        n_ctx_orig;   // tokens the model was trained for
    double         scale;        // S = target context / n_ctx_orig
    double         beta_fast;    // pairs with more turns within n_ctx_orig keep their speed
    double         beta_slow;    // pairs with fewer are slowed by S
    const double * base_factors; // the model's own rope_freqs, or null
    const double * radix;        // CUSTOM only: the table at this very scale
    double         lead;         // CUSTOM only: factors[0], 1 as a rule
};

struct mrrope_info {
    int    d_l;         // last pair that keeps its speed
    int    d_h;         // first pair slowed by S; may lie past the last pair
    double attn_factor; // cos and sin are multiplied by it
};

static inline const char * mrrope_status_str(int status) {
    switch (status) {
        case MRROPE_OK:               return "ok";
        case MRROPE_ERR_METHOD:       return "unknown method";
        case MRROPE_ERR_N_ROT:        return "n_rot must be even, 2 or more";
        case MRROPE_ERR_FREQ_BASE:    return "freq_base must be finite and above 1";
        case MRROPE_ERR_N_CTX_ORIG:   return "n_ctx_orig must be from 1 to 4294967295";
        case MRROPE_ERR_SCALE:        return "scale must be finite, 1 or more";
        case MRROPE_ERR_BETA:         return "beta_fast must be above beta_slow and both above 0";
        case MRROPE_ERR_BASE_FACTORS: return "base factors must be finite and above 0";
        case MRROPE_ERR_RADIX:        return "radix and lead must be above 0 and multiply to finite factors";
        default:                      return "unknown error";
    }
}

static inline const char * mrrope_method_name(int method) {
    switch (method) {
        case MRROPE_METHOD_NONE:       return "none";
        case MRROPE_METHOD_LINEAR:     return "linear";
        case MRROPE_METHOD_NTK:        return "ntk";
        case MRROPE_METHOD_YARN:       return "yarn";
        case MRROPE_METHOD_YARN_TURNS: return "yarn-turns";
        case MRROPE_METHOD_UNI:        return "mrrope-uni";
        case MRROPE_METHOD_PRO:        return "mrrope-pro";
        case MRROPE_METHOD_LLAMA3:     return "llama3";
        case MRROPE_METHOD_CUSTOM:     return "custom";
        default:                       return nullptr;
    }
}

// The method of a name, or -1.
static inline int mrrope_method_from_name(const char * name) {
    for (int m = 0; m < MRROPE_METHOD_COUNT; m++) {
        const char * a = mrrope_method_name(m);
        const char * b = name;
        while (*a != 0 && *a == *b) {
            a++;
            b++;
        }
        if (*a == *b) {
            return m;
        }
    }
    return -1;
}

// theta_i, radians per token
static inline double mrrope_theta(int i, int n_rot, double freq_base) {
    return std::pow(freq_base, -2.0 * i / n_rot);
}

static inline double mrrope_clamp(double x, double lo, double hi) {
    return x < lo ? lo : x > hi ? hi : x;
}

// Where along the pairs, as a real number, one turns `turns` times within n_ctx_orig.
// ln(turns of pair x) = reach - x*slope/n_rot - g(x), g = ln(base_factors), linear between pairs, level beyond both ends.
// The first crossing counts. Without base factors g = 0: ggml_rope_yarn_corr_dim's formula.
static inline double mrrope_pair_of_turns(const mrrope_params & p, double turns) {
    const double pi    = 3.14159265358979323846;
    const double reach = std::log((double) p.n_ctx_orig / (turns * 2.0 * pi));
    const double slope = 2.0 * std::log(p.freq_base);
    if (!p.base_factors) {
        return p.n_rot * reach / slope;
    }
    const int n = p.n_rot / 2;
    double g0 = std::log(p.base_factors[0]);
    const double before = p.n_rot * (reach - g0) / slope;
    if (before <= 0.0) {
        return before;
    }
    for (int i = 0; i < n - 1; i++) {
        const double g1   = std::log(p.base_factors[i + 1]);
        const double rise = g1 - g0;
        if (slope + p.n_rot * rise > 0.0) { // turns fall from pair i to pair i + 1
            const double x = p.n_rot * (reach - g0 + i * rise) / (slope + p.n_rot * rise);
            if (x <= i + 1) {
                return x > i ? x : i;
            }
        }
        g0 = g1;
    }
    const double after = p.n_rot * (reach - g0) / slope;
    return after > n - 1 ? after : n - 1;
}

// Clamped as ggml_rope_yarn_corr_dims does: d_l at 0, d_h at n_rot - 1.
static inline void mrrope_band(const mrrope_params & p, int * d_l, int * d_h) {
    const double lo = std::floor(mrrope_pair_of_turns(p, p.beta_fast));
    const double hi = std::ceil (mrrope_pair_of_turns(p, p.beta_slow));
    *d_l = (int) mrrope_clamp(lo, 0, INT32_MAX);
    *d_h = (int) mrrope_clamp(hi, INT32_MIN, p.n_rot - 1);
}

static inline int mrrope_radix_to_factors(const double * radix, double lead, int n, double * factors) {
    double product = lead;
    for (int i = 0; i < n; i++) {
        if (!(std::isfinite(product) && product > 0.0 && std::isfinite(radix[i]) && radix[i] > 0.0)) {
            return MRROPE_ERR_RADIX;
        }
        factors[i] = product;
        product *= radix[i];
    }
    return MRROPE_OK;
}

// The inverse; factors[0] is the lead.
static inline void mrrope_factors_to_radix(const double * factors, int n, double * radix) {
    for (int i = 0; i < n - 1; i++) {
        radix[i] = factors[i + 1] / factors[i];
    }
    radix[n - 1] = 1.0;
}

// The factors a file's float32 radix stands for, times its base factors (or null): double product, rounded once.
static inline int mrrope_stored_factors(const float * radix, const float * base_factors, float lead, int n, float * out) {
    double product = lead;
    for (int i = 0; i < n; i++) {
        const double f = product * (base_factors ? (double) base_factors[i] : 1.0);
        if (!(f > 0.0 && std::isfinite((float) f) && radix[i] > 0.0f && std::isfinite(radix[i]))) {
            return MRROPE_ERR_RADIX;
        }
        out[i] = (float) f;
        product *= radix[i];
    }
    return MRROPE_OK;
}

static inline double mrrope_attn_factor(int method, double scale) {
    const bool tempered = method == MRROPE_METHOD_YARN || method == MRROPE_METHOD_YARN_TURNS ||
                          method == MRROPE_METHOD_UNI  || method == MRROPE_METHOD_PRO;
    return tempered ? 0.1 * std::log(scale) + 1.0 : 1.0;
}

static inline int mrrope_check(const mrrope_params & p) {
    if (!mrrope_method_name(p.method))                                                        return MRROPE_ERR_METHOD;
    if (p.n_rot < 2 || p.n_rot % 2 != 0)                                                      return MRROPE_ERR_N_ROT;
    if (!(std::isfinite(p.freq_base) && p.freq_base > 1.0))                                   return MRROPE_ERR_FREQ_BASE;
    if (p.n_ctx_orig < 1 || p.n_ctx_orig > (int64_t) UINT32_MAX)                              return MRROPE_ERR_N_CTX_ORIG;
    if (!(std::isfinite(p.scale) && p.scale >= 1.0))                                          return MRROPE_ERR_SCALE;
    if (!(std::isfinite(p.beta_fast) && p.beta_fast > p.beta_slow && p.beta_slow > 0.0))      return MRROPE_ERR_BETA;
    for (int i = 0; p.base_factors && i < p.n_rot / 2; i++) {
        if (!(std::isfinite(p.base_factors[i]) && p.base_factors[i] > 0.0))                   return MRROPE_ERR_BASE_FACTORS;
    }
    if (p.method == MRROPE_METHOD_CUSTOM && !p.radix)                                         return MRROPE_ERR_RADIX;
    return MRROPE_OK;
}

// The factor of pair i under every method but custom. d_l and d_h come from mrrope_band.
static inline double mrrope_factor(const mrrope_params & p, int i, int d_l, int d_h) {
    const double pi = 3.14159265358979323846;
    const double S  = p.scale;
    const int    n  = d_h > d_l ? d_h - d_l : 1; // an empty band is one step
    const double t  = i < d_l ? 0 : i - d_l > n ? n : i - d_l;
    double keep = 1.0;                           // share of its own speed that a mixed pair keeps
    switch (p.method) {
        case MRROPE_METHOD_LINEAR: return S;
        case MRROPE_METHOD_NTK:    return std::pow(S, p.n_rot > 2 ? (double) i / (p.n_rot / 2 - 1) : 0.0);
        case MRROPE_METHOD_UNI:    return std::pow(S, t / n);
        case MRROPE_METHOD_PRO:    return std::pow(S, t * (t + 1) / ((double) n * (n + 1)));
        case MRROPE_METHOD_YARN:   keep = 1.0 - t / n; break;
        case MRROPE_METHOD_YARN_TURNS:
        case MRROPE_METHOD_LLAMA3: {
            const double base  = p.base_factors ? p.base_factors[i] : 1.0;
            const double turns = p.n_ctx_orig * mrrope_theta(i, p.n_rot, p.freq_base) / base / (2.0 * pi);
            keep = mrrope_clamp((turns - p.beta_slow) / (p.beta_fast - p.beta_slow), 0.0, 1.0);
        } break;
        default: return 1.0;
    }
    return mrrope_clamp(1.0 / ((1.0 - keep) / S + keep), 1.0, S);
}

// A table: factors and radix are n_rot/2 doubles each, base factors not included.
static inline int mrrope_table(const mrrope_params & given, double * factors, double * radix, mrrope_info * info) {
    mrrope_params p = given;
    if (p.method == MRROPE_METHOD_LLAMA3 && p.beta_fast == 32.0 && p.beta_slow == 1.0) {
        p.beta_fast = 4.0; // Meta's high_freq_factor; its low_freq_factor is 1
    }
    const int status = mrrope_check(p);
    if (status != MRROPE_OK) {
        return status;
    }
    const int n = p.n_rot / 2;
    mrrope_band(p, &info->d_l, &info->d_h);
    info->attn_factor = mrrope_attn_factor(p.method, p.scale);
    if (p.method == MRROPE_METHOD_CUSTOM) {
        const int bad = mrrope_radix_to_factors(p.radix, p.lead, n, factors);
        if (bad) {
            return bad;
        }
    } else {
        for (int i = 0; i < n; i++) {
            factors[i] = mrrope_factor(p, i, info->d_l, info->d_h);
        }
    }
    mrrope_factors_to_radix(factors, n, radix);
    return MRROPE_OK;
}

// A custom table at another scale: factors(S') = factors(S)^(ln S'/ln S). In place is fine. from must exceed 1.
static inline int mrrope_rescale(const double * factors, double from, double to, int n, double * out) {
    if (!(std::isfinite(from) && std::isfinite(to) && to >= 1.0 && (from > 1.0 || from == to))) {
        return MRROPE_ERR_SCALE;
    }
    const double power = from == to ? 1.0 : std::log(to) / std::log(from);
    for (int i = 0; i < n; i++) {
        out[i] = std::pow(factors[i], power);
    }
    return MRROPE_OK;
}
