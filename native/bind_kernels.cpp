// Bindings of rope and nll. kernels.py has checked values and shapes; here it is only made sure that no byte outside
// the arrays is touched.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "nll.h"
#include "rope.h"

namespace py = pybind11;

namespace {

void require(bool ok, const char * what) {
    if (!ok) {
        throw py::value_error(what);
    }
}

// Throws unless `array` is C-contiguous with n_dims dimensions and items of this kind ('f', 'i') and size.
void check(const py::array & array, char kind, py::ssize_t item_size, py::ssize_t n_dims) {
    const py::dtype dtype = array.dtype();
    require(dtype.kind() == kind && dtype.itemsize() == item_size && array.ndim() == n_dims &&
            (array.flags() & py::array::c_style), "an array of another type, layout or number of dimensions");
}

const mrrope::Kernels & kernels_of(const std::string & level) {
    const mrrope::Kernels * kernels = mrrope::find_kernels(level);
    if (kernels == nullptr) {
        throw py::value_error("no SIMD level '" + level + "' here");
    }
    return *kernels;
}

void rope(const py::array & x, py::array & out, const py::array & positions, const std::vector<double> & theta,
          double attn_factor, bool neox, int n_threads, const std::string & level) {
    const bool half = x.itemsize() == 2;
    check(x, 'f', half ? 2 : 4, 3);
    check(out, 'f', x.itemsize(), 3);
    check(positions, 'i', 8, 1);
    require(std::equal(x.shape(), x.shape() + 3, out.shape()), "x and out differ in shape");
    require(positions.shape(0) == x.shape(0), "x and positions differ in length");
    require(x.shape(1) < 1 << 30 && x.shape(2) < 1 << 30, "too many heads or dims");
    require(2 * (py::ssize_t) theta.size() <= x.shape(2), "more pairs than head_dim holds");
    const mrrope::Shape shape = {x.shape(0), (int) x.shape(1), (int) x.shape(2),
                                 half ? mrrope::Float::f16 : mrrope::Float::f32};
    const mrrope::Kernels & kernels = kernels_of(level);
    const mrrope::Pairs pairs = neox ? mrrope::Pairs::neox : mrrope::Pairs::norm;
    const void * from = x.data();
    void * to = out.mutable_data();
    const int64_t * at = (const int64_t *) positions.data();
    py::gil_scoped_release release;
    mrrope::rope(from, to, shape, at, theta, attn_factor, pairs, kernels, n_threads);
}

void nll(const py::array & logits, const py::array & targets, py::array & out, int n_threads,
         const std::string & level) {
    check(logits, 'f', 4, 2);
    check(targets, 'i', 8, 1);
    check(out, 'f', 4, 1);
    const py::ssize_t n = logits.shape(0), vocab = logits.shape(1);
    require(targets.shape(0) == n && out.shape(0) == n, "logits, targets and out differ in length");
    const int64_t * target = (const int64_t *) targets.data();
    require(std::all_of(target, target + n, [=](int64_t id) { return id >= 0 && id < vocab; }),
            "a target outside the vocabulary");
    const mrrope::Kernels & kernels = kernels_of(level);
    const float * from = (const float *) logits.data();
    float * to = (float *) out.mutable_data();
    py::gil_scoped_release release;
    mrrope::nll(from, target, to, n, (size_t) vocab, kernels, n_threads);
}

std::vector<std::string> simd_levels() {
    std::vector<std::string> names;
    for (const mrrope::Kernels * kernels : mrrope::available_kernels()) {
        names.emplace_back(kernels->name);
    }
    return names;
}

}  // namespace

void register_kernels(py::module_ & m) {
    m.def("rope", &rope, py::arg("x"), py::arg("out"), py::arg("positions"), py::arg("theta"), py::arg("attn_factor"),
          py::arg("neox"), py::arg("n_threads"), py::arg("level"), "See kernels.rope.");
    m.def("nll", &nll, py::arg("logits"), py::arg("targets"), py::arg("out"), py::arg("n_threads"), py::arg("level"),
          "See kernels.nll.");
    m.def("simd_levels", &simd_levels, "The instruction sets that rope and nll can use here, best first.");
}
