// Python's view of the header scan: scan_gguf(buffer, file_size) -> GGUFHeader, raising GGUFError.
#include <pybind11/pybind11.h>

#include "gguf_index.h"

namespace py = pybind11;

namespace {

// Holds a buffer (bytes, mmap, memoryview) while the scan runs, so that it cannot be unmapped under it.
struct Buffer {
    Py_buffer view;
    explicit Buffer(const py::object & object) {
        if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_SIMPLE) != 0) {
            throw py::error_already_set();
        }
    }
    ~Buffer() { PyBuffer_Release(&view); }
    Buffer(const Buffer &) = delete;
    Buffer & operator=(const Buffer &) = delete;
};

py::str text(const std::string & s) {
    return py::reinterpret_steal<py::str>(PyUnicode_DecodeLatin1(s.data(), Py_ssize_t(s.size()), nullptr));
}

mrrope::GgufHeader scan(const py::object & object, uint64_t file_size) {
    const Buffer buffer(object);
    const auto size = uint64_t(buffer.view.len);
    if (file_size < size) {
        throw py::value_error("the file cannot be shorter than the buffer that begins it");
    }
    py::gil_scoped_release release;
    return mrrope::scan_gguf(static_cast<const uint8_t *>(buffer.view.buf), size, file_size);
}

// [(start, key_len, value, end, count, type, item_type or -1), ...]
py::list kv_rows(const mrrope::GgufHeader & header) {
    py::list rows(header.kvs.size());
    for (size_t i = 0; i < header.kvs.size(); ++i) {
        const auto & kv = header.kvs[i];
        const int item = kv.item_type == mrrope::GGUF_NO_ITEM ? -1 : int(kv.item_type);
        rows[i] = py::make_tuple(kv.start, kv.key_len, kv.value, kv.end, kv.count, kv.type, item);
    }
    return rows;
}

// [(start, name_len, end, offset, nbytes, type, dims), ...]
py::list tensor_rows(const mrrope::GgufHeader & header) {
    py::list rows(header.tensors.size());
    for (size_t i = 0; i < header.tensors.size(); ++i) {
        const auto & t = header.tensors[i];
        py::tuple dims(t.n_dims);
        for (uint32_t j = 0; j < t.n_dims; ++j) {
            dims[j] = t.ne[j];
        }
        rows[i] = py::make_tuple(t.start, t.name_len, t.end, t.offset, t.nbytes, t.type, dims);
    }
    return rows;
}

// [(name or None, block_size, type_size), ...] by type number
py::list type_rows() {
    py::list rows;
    for (const auto & type : mrrope::ggml_types) {
        rows.append(py::make_tuple(type.name, type.block_size, type.type_size));
    }
    return rows;
}

}  // namespace

void register_index(py::module_ & m) {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> error;
    error.call_once_and_store_result([&]() { return py::exception<mrrope::GgufError>(m, "GGUFError"); });
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            std::rethrow_exception(p);
        } catch (const mrrope::GgufError & e) {
            const auto args = py::make_tuple(e.offset, text(e.field), text(e.what), text(e.why), text(e.fix));
            PyErr_SetObject(error.get_stored().ptr(), args.ptr());
        }
    });
    py::class_<mrrope::GgufHeader>(m, "GGUFHeader")
        .def_readonly("version", &mrrope::GgufHeader::version)
        .def_readonly("alignment", &mrrope::GgufHeader::alignment)
        .def_readonly("infos_start", &mrrope::GgufHeader::infos_start)
        .def_readonly("infos_end", &mrrope::GgufHeader::infos_end)
        .def_readonly("data_start", &mrrope::GgufHeader::data_start)
        .def("kvs", &kv_rows)
        .def("tensors", &tensor_rows);
    m.def("scan_gguf", &scan, py::arg("buffer"), py::arg("file_size"),
          "Scan the GGUF header at the start of `buffer`, of a file of `file_size` bytes.");
    m.def("ggml_types", &type_rows, "ggml's tensor types: (name or None, block size, type size) by number.");
}
