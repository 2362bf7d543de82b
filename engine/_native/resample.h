// Pillow's antialiased bicubic resize of 8-bit RGB to a square, and the normalisation of its levels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dgm4 {

constexpr int kMaxSide = 1 << 16;  // of a source: bounds the weights of an axis
constexpr int kMaxSize = 1 << 11;  // of an output
constexpr int kChannels = 3, kLevels = 256;
constexpr int kGroup = 4;   // taps that one step of the first pass takes
constexpr int kLines = 4;   // rows that the first pass takes together: they share the weights
constexpr int kLoad = 16;   // bytes that a step loads, of which it uses those of four pixels
constexpr int kMiddle = 4;  // bytes of a pixel between the passes: red, green, blue and one unused

// Resampling of one axis. Output i reads `taps[i]` pixels from `first[i]` on. A weight is a multiple of 2^-22;
// it is kept as high * 2^15 + low, two 16-bit numbers, since CPUs add up products of those in pairs. A pair is
// the weights of two neighbouring pixels. `steps` is the number of groups of four taps, zeros at the end.
struct Axis {
    Axis(int length, int size);

    int length, size, steps;
    std::vector<int> first, taps;
    std::vector<int32_t> weights;    // [size][steps * kGroup]
    std::vector<int32_t> low, high;  // pairs, [size][steps * kGroup / 2]
};

// Rows of pixels in memory, `pixel` (3 or 4) bytes each. `end` is where memory that may be read ends.
struct Rows {
    const uint8_t *start, *end;
    int64_t count;
    std::ptrdiff_t stride;
    int pixel;
};

// The two passes, for one set of instructions.
struct Passes {
    const char *name;
    // kLines rows of pixels to kLines rows of kMiddle * axis.size bytes.
    void (*across)(const uint8_t *const *rows, int pixel, const Axis &axis, uint8_t *const *out);
    // Rows of `bytes` bytes, a multiple of 16, to one row: output `index` of the axis.
    void (*down)(const uint8_t *const *rows, const Axis &axis, int index, int bytes, uint8_t *out);
};

// Those that this CPU has, the best first; never empty.
const std::vector<Passes> &available_passes();

// Resizes an image that comes in bands of rows, into [3, size, size] values of `item` (2 or 4) bytes:
// levels[channel * 256 + level]. Holds as many resampled rows as an output reads.
class Resampler {
  public:
    Resampler(const Passes &passes, int width, int height, int size, const void *levels, int item, void *out);

    void feed(const Rows &rows);  // the next rows of the image, no more than are missing
    int64_t missing() const { return down_.length - next_; }

  private:
    const uint8_t *readable(const Rows &rows, int64_t row, int slot);
    uint8_t *middle(int64_t row) { return &ring_[(row % capacity_) * row_bytes_]; }
    void emit();
    template <class Value> void normalize(const uint8_t *row, int index) const;

    const Passes &passes_;
    Axis across_, down_;
    const void *levels_;
    int item_;
    void *out_;
    int64_t next_ = 0;  // row of the source
    int done_ = 0;      // rows of the output
    int64_t capacity_;
    int row_bytes_;
    std::vector<uint8_t> ring_, padded_, spare_;
    std::vector<const uint8_t *> window_;
};

}  // namespace dgm4
