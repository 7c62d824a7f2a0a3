// Python's view of mrrope.h and bound.h. Arguments are checked by the Python modules tables and bound.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "bound.h"
#include "mrrope.h"

namespace py = pybind11;

namespace {

using Doubles = std::vector<double>;

constexpr size_t MAX_ANGLES = 1 << 16;  // sixteen times any head's: so many fit the scan's tables in 32 bits too

// Angles for the bound's scan, which takes their number as an int.
const Doubles & angles(const Doubles & theta) {
    if (theta.size() > MAX_ANGLES) {
        throw py::value_error("more than 65536 angles");
    }
    return theta;
}

void check(int status) {
    if (status != MRROPE_OK) {
        throw py::value_error(mrrope_status_str(status));
    }
}

// A list's data, once it is as long as the table; null for none.
const double * data_of(const std::optional<Doubles> & values, size_t n, int status) {
    if (values && values->size() != n) {
        check(status);
    }
    return values ? values->data() : nullptr;
}

py::tuple table(const std::string & method, int n_rot, double freq_base, int64_t n_ctx_orig, double scale, double beta_fast,
                double beta_slow, const std::optional<Doubles> & base_factors, const std::optional<Doubles> & radix, double lead) {
    const size_t n = size_t(n_rot > 0 ? n_rot / 2 : 0);
    const mrrope_params params = {
        mrrope_method_from_name(method.c_str()), n_rot, freq_base, n_ctx_orig, scale, beta_fast, beta_slow,
        data_of(base_factors, n, MRROPE_ERR_BASE_FACTORS), data_of(radix, n, MRROPE_ERR_RADIX), lead,
    };
    Doubles factors(n), out(n);
    mrrope_info info = {};
    check(mrrope_table(params, factors.data(), out.data(), &info));
    return py::make_tuple(factors, out, info.attn_factor, info.d_l, info.d_h);
}

std::vector<float> stored_factors(const std::vector<float> & radix, const std::optional<std::vector<float>> & base, float lead) {
    if (base && base->size() != radix.size()) {
        check(MRROPE_ERR_BASE_FACTORS);
    }
    std::vector<float> out(radix.size());
    check(mrrope_stored_factors(radix.data(), base ? base->data() : nullptr, lead, int(radix.size()), out.data()));
    return out;
}

Doubles rescale(Doubles factors, double from, double to) {
    check(mrrope_rescale(factors.data(), from, to, int(factors.size()), factors.data()));
    return factors;
}

std::optional<int64_t> bound(const Doubles & theta, int64_t first, int64_t last) {
    angles(theta);
    const py::gil_scoped_release release;
    const int64_t m = mrrope::bound_scan(theta.data(), int(theta.size()), first, last);
    return m ? std::optional<int64_t>(m) : std::nullopt;
}

double bound_sum(const Doubles & theta, int64_t m) {
    return mrrope::bound_sum(theta.data(), int(angles(theta).size()), m);
}

py::array_t<float> bound_sums(const Doubles & theta, int64_t first, int64_t count) {
    angles(theta);
    py::array_t<float> out(count);
    mrrope::bound_sums(theta.data(), int(theta.size()), first, count, out.mutable_data());
    return out;
}

std::optional<double> min_base(int64_t n_ctx, int n_rot, int digits) {
    if (n_rot / 2 > int(MAX_ANGLES)) {
        throw py::value_error("more than 65536 angles");
    }
    const py::gil_scoped_release release;
    const double base = mrrope::bound_min_base(n_ctx, n_rot, digits);
    return base > 0.0 ? std::optional<double>(base) : std::nullopt;
}

} // namespace

void register_tables(py::module_ & m) {
    m.def("rope_table", &table, py::arg("method"), py::arg("n_rot"), py::arg("freq_base"), py::arg("n_ctx_orig"),
          py::arg("scale"), py::arg("beta_fast"), py::arg("beta_slow"), py::arg("base_factors").none(true),
          py::arg("radix").none(true), py::arg("lead"));
    m.def("stored_factors", &stored_factors, py::arg("radix"), py::arg("base_factors").none(true), py::arg("lead"));
    m.def("rescale", &rescale, py::arg("factors"), py::arg("from_scale"), py::arg("to_scale"));
    m.def("bound", &bound, py::arg("theta"), py::arg("first"), py::arg("last"));
    m.def("bound_sum", &bound_sum, py::arg("theta"), py::arg("m"));
    m.def("bound_sums", &bound_sums, py::arg("theta"), py::arg("first"), py::arg("count"));
    m.def("min_base", &min_base, py::arg("n_ctx"), py::arg("n_rot"), py::arg("digits"));
}
