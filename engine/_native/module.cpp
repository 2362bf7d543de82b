// Python's side: checks the arguments, and works without the GIL.
#include <pybind11/pybind11.h>

#include <cstring>

#include "arrow.h"
#include "resample.h"

namespace py = pybind11;

namespace {

std::string shape_of(const py::buffer_info &info) {
    std::string text = info.format + " of shape (";
    for (py::ssize_t side : info.shape) text += (text.back() == '(' ? "" : ", ") + std::to_string(side);
    return text + ")";
}

void check(bool right, const std::string &message) {
    if (!right) throw py::value_error(message);
}

bool is_dense(const py::buffer_info &info) {
    py::ssize_t step = info.itemsize;
    for (py::ssize_t axis = info.ndim; axis-- > 0; step *= info.shape[axis])
        if (info.strides[axis] != step) return false;
    return reinterpret_cast<std::uintptr_t>(info.ptr) % info.itemsize == 0;
}

// Rows of a uint8 array [rows, width, 3]; the pixels of a row must lie side by side.
dgm4::Rows rows_of(const py::buffer_info &info, int width) {
    check(info.format == "B" && info.ndim == 3 && info.shape[1] == width && info.shape[2] == dgm4::kChannels &&
              info.strides[2] == 1 && info.strides[1] == dgm4::kChannels,
          "expected rows as uint8 of shape (rows, " + std::to_string(width) + ", 3), got " + shape_of(info));
    const auto *start = static_cast<const uint8_t *>(info.ptr);
    const std::ptrdiff_t row = info.strides[0], used = static_cast<std::ptrdiff_t>(width) * dgm4::kChannels;
    if (info.shape[0] == 0) return {start, start, 0, row, dgm4::kChannels};
    return {start, start + (info.shape[0] - 1) * row + used, info.shape[0], row, dgm4::kChannels};
}

// Feeds one band: an array, or the two capsules of Arrow's interface, with four bytes a pixel.
void feed(dgm4::Resampler &resampler, const py::handle &band, int width) {
    const auto run = [&](const dgm4::Rows &rows) {
        check(rows.count <= resampler.missing(), "expected " + std::to_string(resampler.missing()) +
                                                     " more rows, got " + std::to_string(rows.count));
        py::gil_scoped_release unlocked;
        resampler.feed(rows);
    };
    if (py::isinstance<py::tuple>(band)) {
        run(dgm4::rows_of_arrow(py::reinterpret_borrow<py::tuple>(band), width));
    } else {
        const py::buffer_info info = py::cast<py::buffer>(band).request();
        run(rows_of(info, width));
    }
}

const dgm4::Passes &choose(const char *name) {
    for (const dgm4::Passes &passes : dgm4::available_passes())
        if (!name || !std::strcmp(name, passes.name)) return passes;
    throw py::value_error("this CPU has no " + std::string(name));
}

void resample(const py::iterable &bands, int width, int height, const py::buffer &levels, const py::buffer &out,
              const char *passes) {
    check(width >= 1 && height >= 1 && width <= dgm4::kMaxSide && height <= dgm4::kMaxSide,
          "expected sides of 1 to " + std::to_string(dgm4::kMaxSide) + ", got " + std::to_string(width) + " x " +
              std::to_string(height));
    const py::buffer_info to = out.request(true), table = levels.request();
    const bool number = to.format == "f" || to.format == "e";  // float32, float16
    check(number && to.ndim == 3 && to.shape[0] == dgm4::kChannels && to.shape[1] == to.shape[2] &&
              to.shape[1] >= 1 && to.shape[1] <= dgm4::kMaxSize && is_dense(to),
          "expected out as dense float32 or float16 of shape (3, S, S), got " + shape_of(to));
    check(table.format == to.format && table.ndim == 2 && table.shape[0] == dgm4::kChannels &&
              table.shape[1] == dgm4::kLevels && is_dense(table),
          "expected levels as dense " + to.format + " of shape (3, 256), got " + shape_of(table));
    dgm4::Resampler resampler(choose(passes), width, height, static_cast<int>(to.shape[1]), table.ptr,
                              static_cast<int>(to.itemsize), to.ptr);
    for (const py::handle &band : bands) feed(resampler, band, width);  // the loop keeps the band's memory
    check(resampler.missing() == 0, "expected " + std::to_string(resampler.missing()) + " more rows, got none");
}

}  // namespace

PYBIND11_MODULE(_resample, module, py::mod_gil_not_used()) {
    module.def("resample", &resample, py::arg("bands"), py::arg("width"), py::arg("height"), py::arg("levels"),
               py::arg("out"), py::kw_only(), py::arg("passes") = static_cast<const char *>(nullptr));
    module.def("passes", [] {
        py::list names;
        for (const dgm4::Passes &passes : dgm4::available_passes()) names.append(passes.name);
        return names;
    });
}
