// The passes of a resize for each set of instructions, and the choice of one at run time.
#include <algorithm>
#include <cstring>

#include "resample.h"

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define DGM4_X86 1
#include <immintrin.h>
#elif defined(__GNUC__) && defined(__aarch64__)
#define DGM4_NEON 1
#include <arm_neon.h>
#endif

namespace dgm4 {
namespace {

constexpr int kBits = 22, kLowBits = 15;
constexpr int32_t kHalf = 1 << (kBits - 1);

// Bytes of two pixels, each widened to 16 bits: red of both, green of both, blue of both; 0x80 gives zero.
// [bytes of a pixel - 3][first or second two of four pixels]
alignas(16) [[maybe_unused]] const uint8_t kPick[2][2][16] = {
    {{0, 0x80, 3, 0x80, 1, 0x80, 4, 0x80, 2, 0x80, 5, 0x80, 0x80, 0x80, 0x80, 0x80},
     {6, 0x80, 9, 0x80, 7, 0x80, 10, 0x80, 8, 0x80, 11, 0x80, 0x80, 0x80, 0x80, 0x80}},
    {{0, 0x80, 4, 0x80, 1, 0x80, 5, 0x80, 2, 0x80, 6, 0x80, 0x80, 0x80, 0x80, 0x80},
     {8, 0x80, 12, 0x80, 9, 0x80, 13, 0x80, 10, 0x80, 14, 0x80, 0x80, 0x80, 0x80, 0x80}}};

// What the first pass reads of an axis, and where it writes. A store of bytes may change anything that lies in
// memory, as far as a compiler knows; these lie in registers.
struct View {
    View(const Axis &axis, uint8_t *const *lines)
        : size(axis.size), pairs(axis.steps * kGroup / 2), first(axis.first.data()), taps(axis.taps.data()),
          low(axis.low.data()), high(axis.high.data()) {
        std::copy(lines, lines + kLines, out);
    }

    int size, pairs;
    const int *first, *taps;
    const int32_t *low, *high;
    uint8_t *out[kLines];
};

// ---- plain C++

uint8_t level(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

void across_plain(const uint8_t *const *rows, int pixel, const Axis &axis, uint8_t *const *out) {
    for (int line = 0; line < kLines; ++line) {
        for (int i = 0; i < axis.size; ++i) {
            const int32_t *weights = &axis.weights[static_cast<std::size_t>(i) * axis.steps * kGroup];
            const uint8_t *in = rows[line] + static_cast<std::ptrdiff_t>(axis.first[i]) * pixel;
            int32_t red = kHalf, green = kHalf, blue = kHalf;
            for (int tap = 0; tap < axis.taps[i]; ++tap, in += pixel) {
                red += in[0] * weights[tap];
                green += in[1] * weights[tap];
                blue += in[2] * weights[tap];
            }
            uint8_t *to = out[line] + i * kMiddle;
            to[0] = level(red);
            to[1] = level(green);
            to[2] = level(blue);
        }
    }
}

void down_plain(const uint8_t *const *rows, const Axis &axis, int index, int bytes, uint8_t *out) {
    const int32_t *weights = &axis.weights[static_cast<std::size_t>(index) * axis.steps * kGroup];
    for (int x = 0; x < bytes; x += 16) {
        int32_t sum[16];
        std::fill(sum, sum + 16, kHalf);
        for (int tap = 0; tap < axis.taps[index]; ++tap)
            for (int i = 0; i < 16; ++i) sum[i] += rows[tap][x + i] * weights[tap];
        for (int i = 0; i < 16; ++i) out[x + i] = level(sum[i]);
    }
}

#if DGM4_X86

// ---- SSE4.1: a register is one line

#define DGM4_SSE4 __attribute__((target("sse4.1")))

DGM4_SSE4 inline __m128i load(const void *from) { return _mm_loadu_si128(static_cast<const __m128i *>(from)); }

DGM4_SSE4 inline __m128i joined(__m128i high, __m128i low) {
    return _mm_srai_epi32(_mm_add_epi32(_mm_slli_epi32(high, kLowBits), low), kBits);
}

DGM4_SSE4 void across_sse4(const uint8_t *const *rows, int pixel, const Axis &axis, uint8_t *const *out) {
    const __m128i pick[2] = {load(kPick[pixel - 3][0]), load(kPick[pixel - 3][1])};
    const View view(axis, out);
    const int32_t *lows = view.low, *highs = view.high;
    for (int i = 0; i < view.size; ++i, lows += view.pairs, highs += view.pairs) {
        std::ptrdiff_t at = static_cast<std::ptrdiff_t>(view.first[i]) * pixel;
        __m128i low[kLines], high[kLines];
        for (int line = 0; line < kLines; ++line) {
            low[line] = _mm_set1_epi32(kHalf);
            high[line] = _mm_setzero_si128();
        }
        const int steps = (view.taps[i] + kGroup - 1) / kGroup;
        for (int step = 0; step < steps; ++step, at += kGroup * pixel) {
            for (int half = 0; half < 2; ++half) {
                const __m128i l = _mm_set1_epi32(lows[step * 2 + half]), h = _mm_set1_epi32(highs[step * 2 + half]);
                for (int line = 0; line < kLines; ++line) {
                    const __m128i two = _mm_shuffle_epi8(load(rows[line] + at), pick[half]);
                    low[line] = _mm_add_epi32(low[line], _mm_madd_epi16(two, l));
                    high[line] = _mm_add_epi32(high[line], _mm_madd_epi16(two, h));
                }
            }
        }
        const __m128i words[2] = {_mm_packs_epi32(joined(high[0], low[0]), joined(high[1], low[1])),
                                  _mm_packs_epi32(joined(high[2], low[2]), joined(high[3], low[3]))};
        alignas(16) uint8_t levels[16];
        _mm_store_si128(reinterpret_cast<__m128i *>(levels), _mm_packus_epi16(words[0], words[1]));
        for (int line = 0; line < kLines; ++line) std::memcpy(view.out[line] + i * kMiddle, levels + 4 * line, 4);
    }
}

DGM4_SSE4 void down_sse4(const uint8_t *const *rows, const Axis &axis, int index, int bytes, uint8_t *out) {
    const int32_t *lows = &axis.low[static_cast<std::size_t>(index) * axis.steps * 2];
    const int32_t *highs = &axis.high[static_cast<std::size_t>(index) * axis.steps * 2];
    const int pairs = (axis.taps[index] + 1) / 2;
    const __m128i zero = _mm_setzero_si128();
    for (int x = 0; x < bytes; x += 16) {
        __m128i low[4], high[4];
        for (int part = 0; part < 4; ++part) low[part] = _mm_set1_epi32(kHalf), high[part] = zero;
        for (int pair = 0; pair < pairs; ++pair) {
            const __m128i l = _mm_set1_epi32(lows[pair]), h = _mm_set1_epi32(highs[pair]);
            const __m128i a = load(rows[2 * pair] + x), b = load(rows[2 * pair + 1] + x);
            const __m128i ab[2] = {_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)};
            for (int part = 0; part < 4; ++part) {
                const __m128i bytes8 = ab[part / 2];
                const __m128i two = part % 2 ? _mm_unpackhi_epi8(bytes8, zero) : _mm_unpacklo_epi8(bytes8, zero);
                low[part] = _mm_add_epi32(low[part], _mm_madd_epi16(two, l));
                high[part] = _mm_add_epi32(high[part], _mm_madd_epi16(two, h));
            }
        }
        const __m128i words[2] = {_mm_packs_epi32(joined(high[0], low[0]), joined(high[1], low[1])),
                                  _mm_packs_epi32(joined(high[2], low[2]), joined(high[3], low[3]))};
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out + x), _mm_packus_epi16(words[0], words[1]));
    }
}

// ---- AVX2: a register is two lines of the first pass, or 16 bytes of a row of the second, as 16-bit numbers

#define DGM4_AVX2 __attribute__((target("avx2")))

DGM4_AVX2 inline __m128i load_avx2(const void *from) {
    return _mm_loadu_si128(static_cast<const __m128i *>(from));
}

DGM4_AVX2 inline __m256i joined(__m256i high, __m256i low) {
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, kLowBits), low), kBits);
}

DGM4_AVX2 void across_avx2(const uint8_t *const *rows, int pixel, const Axis &axis, uint8_t *const *out) {
    const __m256i pick[2] = {_mm256_broadcastsi128_si256(load_avx2(kPick[pixel - 3][0])),
                             _mm256_broadcastsi128_si256(load_avx2(kPick[pixel - 3][1]))};
    const View view(axis, out);
    const int32_t *lows = view.low, *highs = view.high;
    for (int i = 0; i < view.size; ++i, lows += view.pairs, highs += view.pairs) {
        std::ptrdiff_t at = static_cast<std::ptrdiff_t>(view.first[i]) * pixel;
        __m256i low[2], high[2];
        for (int two = 0; two < 2; ++two) {
            low[two] = _mm256_set1_epi32(kHalf);
            high[two] = _mm256_setzero_si256();
        }
        const int steps = (view.taps[i] + kGroup - 1) / kGroup;
        for (int step = 0; step < steps; ++step, at += kGroup * pixel) {
            const __m256i in[2] = {
                _mm256_inserti128_si256(_mm256_castsi128_si256(load_avx2(rows[0] + at)), load_avx2(rows[1] + at), 1),
                _mm256_inserti128_si256(_mm256_castsi128_si256(load_avx2(rows[2] + at)), load_avx2(rows[3] + at), 1)};
            for (int half = 0; half < 2; ++half) {
                const __m256i l = _mm256_set1_epi32(lows[step * 2 + half]);
                const __m256i h = _mm256_set1_epi32(highs[step * 2 + half]);
                for (int two = 0; two < 2; ++two) {
                    const __m256i words = _mm256_shuffle_epi8(in[two], pick[half]);
                    low[two] = _mm256_add_epi32(low[two], _mm256_madd_epi16(words, l));
                    high[two] = _mm256_add_epi32(high[two], _mm256_madd_epi16(words, h));
                }
            }
        }
        // Packing keeps to the halves of a register: lines 0 and 2 lie in the first one, 1 and 3 in the second.
        const __m256i words = _mm256_packs_epi32(joined(high[0], low[0]), joined(high[1], low[1]));
        alignas(32) uint8_t levels[32];
        _mm256_store_si256(reinterpret_cast<__m256i *>(levels), _mm256_packus_epi16(words, words));
        for (int line = 0; line < kLines; ++line)
            std::memcpy(view.out[line] + i * kMiddle, levels + (line % 2) * 16 + (line / 2) * 4, 4);
    }
}

DGM4_AVX2 void down_avx2(const uint8_t *const *rows, const Axis &axis, int index, int bytes, uint8_t *out) {
    const int32_t *lows = &axis.low[static_cast<std::size_t>(index) * axis.steps * 2];
    const int32_t *highs = &axis.high[static_cast<std::size_t>(index) * axis.steps * 2];
    const int pairs = (axis.taps[index] + 1) / 2;
    for (int x = 0; x < bytes; x += 16) {
        __m256i low[2], high[2];
        for (int part = 0; part < 2; ++part) {
            low[part] = _mm256_set1_epi32(kHalf);
            high[part] = _mm256_setzero_si256();
        }
        for (int pair = 0; pair < pairs; ++pair) {
            const __m256i l = _mm256_set1_epi32(lows[pair]), h = _mm256_set1_epi32(highs[pair]);
            const __m256i a = _mm256_cvtepu8_epi16(load_avx2(rows[2 * pair] + x));
            const __m256i b = _mm256_cvtepu8_epi16(load_avx2(rows[2 * pair + 1] + x));
            const __m256i words[2] = {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)};
            for (int part = 0; part < 2; ++part) {
                low[part] = _mm256_add_epi32(low[part], _mm256_madd_epi16(words[part], l));
                high[part] = _mm256_add_epi32(high[part], _mm256_madd_epi16(words[part], h));
            }
        }
        // Unpacking and packing keep to the halves of a register, so that the order is the bytes' again.
        const __m256i words = _mm256_packs_epi32(joined(high[0], low[0]), joined(high[1], low[1]));
        const __m128i levels = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out + x), levels);
    }
}

#elif DGM4_NEON

// ---- NEON, which every 64-bit ARM has

// Sums of neighbouring products, as SSE's madd.
inline int32x4_t products(int16x8_t words, int32_t pair) {
    const int16x8_t weights = vreinterpretq_s16_s32(vdupq_n_s32(pair));
    return vpaddq_s32(vmull_s16(vget_low_s16(words), vget_low_s16(weights)), vmull_high_s16(words, weights));
}

inline int16x4_t joined(int32x4_t high, int32x4_t low) {
    return vqmovn_s32(vshrq_n_s32(vaddq_s32(vshlq_n_s32(high, kLowBits), low), kBits));
}

void across_neon(const uint8_t *const *rows, int pixel, const Axis &axis, uint8_t *const *out) {
    const uint8x16_t pick[2] = {vld1q_u8(kPick[pixel - 3][0]), vld1q_u8(kPick[pixel - 3][1])};
    const View view(axis, out);
    const int32_t *lows = view.low, *highs = view.high;
    for (int i = 0; i < view.size; ++i, lows += view.pairs, highs += view.pairs) {
        std::ptrdiff_t at = static_cast<std::ptrdiff_t>(view.first[i]) * pixel;
        int32x4_t low[kLines], high[kLines];
        for (int line = 0; line < kLines; ++line) low[line] = vdupq_n_s32(kHalf), high[line] = vdupq_n_s32(0);
        const int steps = (view.taps[i] + kGroup - 1) / kGroup;
        for (int step = 0; step < steps; ++step, at += kGroup * pixel) {
            for (int line = 0; line < kLines; ++line) {
                const uint8x16_t in = vld1q_u8(rows[line] + at);
                for (int half = 0; half < 2; ++half) {
                    const int16x8_t two = vreinterpretq_s16_u8(vqtbl1q_u8(in, pick[half]));
                    low[line] = vaddq_s32(low[line], products(two, lows[step * 2 + half]));
                    high[line] = vaddq_s32(high[line], products(two, highs[step * 2 + half]));
                }
            }
        }
        for (int line = 0; line < kLines; ++line) {
            const int16x4_t words = joined(high[line], low[line]);
            uint8_t levels[8];
            vst1_u8(levels, vqmovun_s16(vcombine_s16(words, words)));
            std::memcpy(view.out[line] + i * kMiddle, levels, 4);
        }
    }
}

void down_neon(const uint8_t *const *rows, const Axis &axis, int index, int bytes, uint8_t *out) {
    const int32_t *lows = &axis.low[static_cast<std::size_t>(index) * axis.steps * 2];
    const int32_t *highs = &axis.high[static_cast<std::size_t>(index) * axis.steps * 2];
    const int pairs = (axis.taps[index] + 1) / 2;
    for (int x = 0; x < bytes; x += 8) {
        int32x4_t low[2], high[2];
        for (int part = 0; part < 2; ++part) low[part] = vdupq_n_s32(kHalf), high[part] = vdupq_n_s32(0);
        for (int pair = 0; pair < pairs; ++pair) {
            const int16x8_t a = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(rows[2 * pair] + x)));
            const int16x8_t b = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(rows[2 * pair + 1] + x)));
            const int16x8_t words[2] = {vzip1q_s16(a, b), vzip2q_s16(a, b)};
            for (int part = 0; part < 2; ++part) {
                low[part] = vaddq_s32(low[part], products(words[part], lows[pair]));
                high[part] = vaddq_s32(high[part], products(words[part], highs[pair]));
            }
        }
        vst1_u8(out + x, vqmovun_s16(vcombine_s16(joined(high[0], low[0]), joined(high[1], low[1]))));
    }
}

#endif

std::vector<Passes> find_passes() {
    std::vector<Passes> found;
#if DGM4_X86
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", across_avx2, down_avx2});
    if (__builtin_cpu_supports("sse4.1")) found.push_back({"sse4", across_sse4, down_sse4});
#elif DGM4_NEON
    found.push_back({"neon", across_neon, down_neon});
#endif
    found.push_back({"plain", across_plain, down_plain});
    return found;
}

}  // namespace

const std::vector<Passes> &available_passes() {
    static const std::vector<Passes> found = find_passes();
    return found;
}

}  // namespace dgm4
