// Bindings of rope and nll. kernels.py has checked values and shapes; here it is only made sure that no byte outside
// the buffers is touched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "nll.h"
#include "rope.h"

namespace py = pybind11;

namespace {

// A C-contiguous buffer of items of the struct-module format `format` and `n_dims` dimensions.
py::buffer_info request(const py::buffer & buffer, const char * name, char format, py::ssize_t n_dims, bool writable) {
    py::buffer_info info = buffer.request(writable);
    py::ssize_t expected = info.itemsize;
    bool contiguous = true;
    for (py::ssize_t i = info.ndim; i-- > 0; expected *= info.shape[(size_t) i]) {
        contiguous = contiguous && (info.shape[(size_t) i] == 1 || info.strides[(size_t) i] == expected);
    }
    const bool item = info.format.size() == 1 && (info.format[0] == format || (format == 'q' && info.format[0] == 'l' &&
                                                                               info.itemsize == 8));
    if (info.ndim != n_dims || !item || (!contiguous && info.size > 0)) {
        throw py::value_error(std::string(name) + ": not a contiguous buffer of the expected type and dimensions");
    }
    return info;
}

const mrrope::Kernels & kernels_of(const std::string & level) {
    const mrrope::Kernels * kernels = mrrope::find_kernels(level);
    if (kernels == nullptr) {
        throw py::value_error("no SIMD level '" + level + "' here");
    }
    return *kernels;
}

void require(bool ok, const char * what) {
    if (!ok) {
        throw py::value_error(what);
    }
}

void rope(const py::buffer & x, const py::buffer & out, const py::buffer & positions, const std::vector<double> & theta,
          double attn_factor, bool half, bool neox, int n_threads, const std::string & level) {
    const char format = half ? 'e' : 'f';
    const py::buffer_info in = request(x, "x", format, 3, false), to = request(out, "out", format, 3, true);
    const py::buffer_info at = request(positions, "positions", 'q', 1, false);
    require(in.shape == to.shape && at.shape[0] == in.shape[0], "x, out and positions differ in shape");
    require(in.shape[1] < 1 << 30 && in.shape[2] < 1 << 30, "too many heads or dims");
    require(2 * (py::ssize_t) theta.size() <= in.shape[2], "more pairs than head_dim holds");
    const mrrope::Shape shape = {in.shape[0], (int) in.shape[1], (int) in.shape[2],
                                 half ? mrrope::Float::f16 : mrrope::Float::f32};
    const mrrope::Kernels & kernels = kernels_of(level);
    const mrrope::Pairs pairs = neox ? mrrope::Pairs::neox : mrrope::Pairs::norm;
    py::gil_scoped_release release;
    mrrope::rope(in.ptr, to.ptr, shape, (const int64_t *) at.ptr, theta, attn_factor, pairs, kernels, n_threads);
}

void nll(const py::buffer & logits, const py::buffer & targets, const py::buffer & out, int n_threads,
         const std::string & level) {
    const py::buffer_info in = request(logits, "logits", 'f', 2, false), to = request(out, "out", 'f', 1, true);
    const py::buffer_info at = request(targets, "targets", 'q', 1, false);
    const py::ssize_t n = in.shape[0], vocab = in.shape[1];
    require(at.shape[0] == n && to.shape[0] == n, "logits, targets and out differ in length");
    const int64_t * target = (const int64_t *) at.ptr;
    for (py::ssize_t i = 0; i < n; i++) {
        require(target[i] >= 0 && target[i] < vocab, "a target outside the vocabulary");
    }
    const mrrope::Kernels & kernels = kernels_of(level);
    py::gil_scoped_release release;
    mrrope::nll((const float *) in.ptr, target, (float *) to.ptr, n, (size_t) vocab, kernels, n_threads);
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
          py::arg("half"), py::arg("neox"), py::arg("n_threads"), py::arg("level"), "See kernels.rope.");
    m.def("nll", &nll, py::arg("logits"), py::arg("targets"), py::arg("out"), py::arg("n_threads"), py::arg("level"),
          "See kernels.nll.");
    m.def("simd_levels", &simd_levels, "The instruction sets that rope and nll can use here, best first.");
}
