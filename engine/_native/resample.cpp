// See resample.h. Source of the arithmetic: Pillow, src/libImaging/Resample.c (its documented filter and
// precision). This file is compiled without contraction of a product and a sum: the weights must be Pillow's.
#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dgm4 {
namespace {

constexpr int kBits = 32 - 8 - 2;  // of a weight, beside a level and two bits for the sum
constexpr int kLowBits = 15;
constexpr double kSupport = 2.0, kCubic = -0.5;

double cubic(double x) {
    x = std::fabs(x);
    if (x < 1.0) return ((kCubic + 2.0) * x - (kCubic + 3.0)) * x * x + 1;
    if (x < kSupport) return (((x - 5) * x + 8) * x - 4) * kCubic;
    return 0.0;
}

int32_t pair(int32_t first, int32_t second) {
    return static_cast<int32_t>((static_cast<uint32_t>(second) << 16) | (static_cast<uint32_t>(first) & 0xffff));
}

}  // namespace

Axis::Axis(int length, int size) : length(length), size(size), steps(0), first(size), taps(size) {
    const double scale = static_cast<double>(length) / size, stretch = std::max(scale, 1.0);
    const double support = kSupport * stretch, narrow = 1.0 / stretch;
    for (int i = 0; i < size; ++i) {
        const double centre = (i + 0.5) * scale;
        first[i] = std::max(static_cast<int>(centre - support + 0.5), 0);
        taps[i] = std::min(static_cast<int>(centre + support + 0.5), length) - first[i];
        steps = std::max(steps, (taps[i] + kGroup - 1) / kGroup);
    }
    const std::size_t padded = static_cast<std::size_t>(steps) * kGroup;
    weights.resize(size * padded);
    low.resize(weights.size() / 2);
    high.resize(weights.size() / 2);
    std::vector<double> exact(padded);
    for (int i = 0; i < size; ++i) {
        const double centre = (i + 0.5) * scale;
        double sum = 0.0;
        for (int tap = 0; tap < taps[i]; ++tap) {
            exact[tap] = cubic((tap + first[i] - centre + 0.5) * narrow);
            sum += exact[tap];
        }
        int32_t *fixed = &weights[i * padded];
        for (int tap = 0; tap < taps[i]; ++tap) {
            const double weight = sum != 0.0 ? exact[tap] / sum : exact[tap];
            fixed[tap] = static_cast<int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << kBits));
        }
        for (std::size_t tap = 0; tap < padded; tap += 2) {
            constexpr int32_t mask = (1 << kLowBits) - 1;
            low[(i * padded + tap) / 2] = pair(fixed[tap] & mask, fixed[tap + 1] & mask);
            high[(i * padded + tap) / 2] = pair(fixed[tap] >> kLowBits, fixed[tap + 1] >> kLowBits);
        }
    }
}

Resampler::Resampler(
    const Passes &passes, int width, int height, int size, const void *levels, int item, void *out)
    : passes_(passes), across_(width, size), down_(height, size), levels_(levels), item_(item), out_(out),
      capacity_(down_.steps * kGroup + kLines),  // a window that wants one more row, and those of one step
      row_bytes_((size + 3) / 4 * 4 * kMiddle), ring_(capacity_ * row_bytes_), spare_(row_bytes_),
      window_(static_cast<std::size_t>(down_.steps) * kGroup) {}

// Row `row` of `rows`, or a copy with kLoad bytes after it where what follows it may not be read.
const uint8_t *Resampler::readable(const Rows &rows, int64_t row, int slot) {
    const uint8_t *start = rows.start + row * rows.stride;
    const std::ptrdiff_t used = static_cast<std::ptrdiff_t>(across_.length) * rows.pixel;
    // Between rows that do not follow one another may be anything.
    if (rows.stride == used && rows.end - start >= used + kLoad) return start;
    padded_.resize(kLines * (used + kLoad));  // the same number for all rows of an image
    uint8_t *copy = &padded_[slot * (used + kLoad)];
    std::memcpy(copy, start, used);
    return copy;
}

void Resampler::feed(const Rows &rows) {
    const uint8_t *from[kLines];
    uint8_t *to[kLines];
    for (int64_t row = 0; row < rows.count; row += kLines) {
        const int lines = static_cast<int>(std::min<int64_t>(kLines, rows.count - row));
        for (int line = 0; line < kLines; ++line) {
            // Lines that are lacking repeat the first one and go nowhere.
            from[line] = line < lines ? readable(rows, row + line, line) : from[0];
            to[line] = line < lines ? middle(next_ + line) : spare_.data();
        }
        passes_.across(from, rows.pixel, across_, to);
        next_ += lines;
        emit();
    }
}

// Makes the rows of the output whose rows of the source are all there.
void Resampler::emit() {
    for (; done_ < down_.size && down_.first[done_] + down_.taps[done_] <= next_; ++done_) {
        for (int tap = 0; tap < down_.steps * kGroup; ++tap) {
            // A tap past the last has no weight; it may read that one again.
            window_[tap] = middle(down_.first[done_] + std::min(tap, down_.taps[done_] - 1));
        }
        passes_.down(window_.data(), down_, done_, row_bytes_, spare_.data());
        if (item_ == 4)
            normalize<uint32_t>(spare_.data(), done_);
        else
            normalize<uint16_t>(spare_.data(), done_);
    }
}

template <class Value> void Resampler::normalize(const uint8_t *row, int index) const {
    const std::size_t size = across_.size;
    for (int channel = 0; channel < kChannels; ++channel) {
        const Value *levels = static_cast<const Value *>(levels_) + channel * kLevels;
        Value *out = static_cast<Value *>(out_) + (channel * size + index) * size;
        for (std::size_t x = 0; x < size; ++x) out[x] = levels[row[x * kMiddle + channel]];
    }
}

}  // namespace dgm4
