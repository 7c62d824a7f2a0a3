// Rope tables from any numbers, as a header could hold them: mrrope.h is what the patch puts into llama.cpp.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "../../native/mrrope.h"

namespace {

class Numbers {
public:
    Numbers(const uint8_t * data, size_t size) : data_(data), left_(size) {}

    template <class T>
    T next() {
        T value{};
        const size_t n = left_ < sizeof value ? left_ : sizeof value;
        std::memcpy(&value, data_, n);
        data_ += n;
        left_ -= n;
        return value;
    }

    // Half the time a number as people write them, else any bits
    double real() {
        const auto kind = next<uint8_t>();
        return kind & 1 ? next<double>() : next<float>();
    }

private:
    const uint8_t * data_;
    size_t left_;
};

void check_table(const mrrope_params & params, const std::vector<double> & factors, const mrrope_info & info) {
    CHECK(std::isfinite(info.attn_factor) && info.attn_factor >= 1.0);
    CHECK(info.d_l >= 0 && info.d_h <= params.n_rot - 1);
    for (const double factor : factors) {
        CHECK(std::isfinite(factor) && factor > 0.0);
        CHECK(params.method == MRROPE_METHOD_CUSTOM || (factor >= 1.0 && factor <= params.scale * (1 + 1e-12)));
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    Numbers in(data, size);
    const int method = in.next<uint8_t>() % 11 - 1;
    const int16_t n_rot = in.next<int16_t>() % 300;
    const auto flags = in.next<uint8_t>();
    const size_t n = n_rot > 0 ? size_t(n_rot) / 2 : 0;
    const mrrope_params given = {method, n_rot, in.real(), in.next<int64_t>(), in.real(), in.real(), in.real(), nullptr, nullptr,
                                 flags & 4 ? in.real() : 1.0};
    std::vector<double> base(n, 1.0), radix(n, 1.0), factors(n), out(n);
    for (size_t i = 0; i < n && i < 12; ++i) {
        base[i] = flags & 1 ? in.real() : 1.0;
        radix[i] = flags & 2 ? in.real() : 1.0;
    }
    mrrope_params params = given;
    params.base_factors = flags & 1 ? base.data() : nullptr;
    params.radix = flags & 2 ? radix.data() : nullptr;
    mrrope_info info = {};
    if (mrrope_table(params, factors.data(), out.data(), &info) != MRROPE_OK) {
        return 0;
    }
    check_table(params, factors, info);
    const std::vector<float> stored(out.begin(), out.end()), own(base.begin(), base.end());
    std::vector<float> final(n);
    if (mrrope_stored_factors(stored.data(), own.data(), float(factors[0]), int(n), final.data()) == MRROPE_OK) {
        for (const float factor : final) {
            CHECK(std::isfinite(factor));
        }
    }
    mrrope_rescale(factors.data(), params.scale, in.real(), int(n), out.data());
    return 0;
}
