// The Python module mrrope_gguf._native: one register_* call per part of the core.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void register_tables(py::module_ & m);   // bind_tables.cpp: rope tables and the bound
void register_kernels(py::module_ & m);  // bind_kernels.cpp: rope, nll
void register_index(py::module_ & m);    // bind_index.cpp: GGUF header scan

PYBIND11_MODULE(_native, m) {
    m.doc() = "The C++ core of mrrope-gguf.";
    register_tables(m);
    register_kernels(m);
    register_index(m);
}
