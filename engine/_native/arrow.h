// Pixels of an image by Arrow's C data interface (https://arrow.apache.org/docs/format/CDataInterface.html),
// which Pillow speaks from 11.2 on: its own memory, without a copy.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>

#include "resample.h"

namespace dgm4 {

// The two structures as the interface states them.
struct ArrowSchema {
    const char *format, *name, *metadata;
    int64_t flags, n_children;
    ArrowSchema **children, *dictionary;
    void (*release)(ArrowSchema *);
    void *private_data;
};

struct ArrowArray {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    ArrowArray **children, *dictionary;
    void (*release)(ArrowArray *);
    void *private_data;
};

// Rows of `width` pixels of four bytes; raises ValueError for any other array.
inline Rows rows_of_arrow(const pybind11::tuple &capsules, int width) {
    constexpr int pixel = 4;
    const auto refuse = [] { return pybind11::value_error("expected an Arrow array of four bytes a pixel"); };
    const auto get = [&](int index, const char *name) {
        PyObject *capsule = capsules[index].ptr();
        if (!PyCapsule_IsValid(capsule, name)) throw refuse();
        return PyCapsule_GetPointer(capsule, name);
    };
    if (capsules.size() != 2) throw refuse();
    const auto *schema = static_cast<const ArrowSchema *>(get(0, "arrow_schema"));
    const auto *array = static_cast<const ArrowArray *>(get(1, "arrow_array"));
    if (!schema->release || !array->release || std::strcmp(schema->format, "+w:4") != 0 ||
        schema->n_children != 1 || std::strcmp(schema->children[0]->format, "C") != 0 || array->n_children != 1)
        throw refuse();
    const ArrowArray &bytes = *array->children[0];
    const int64_t count = array->length / width;
    if (array->offset || bytes.offset || bytes.n_buffers != 2 || !bytes.buffers[1] || count * width != array->length ||
        bytes.length / pixel < array->length)
        throw refuse();
    const auto *start = static_cast<const uint8_t *>(bytes.buffers[1]);
    return {start, start + array->length * pixel, count, static_cast<std::ptrdiff_t>(width) * pixel, pixel};
}

}  // namespace dgm4
