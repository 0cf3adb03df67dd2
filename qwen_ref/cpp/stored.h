// y = x W^T + bias with a matrix of any layout. A row is made fp32 in the first-level cache, by its definition in
// `quant/packed.py` and `quant/gguf_blocks.py`, and multiplied; or some rows are made what the caller multiplies.
#pragma once

#include "numbers.h"
#include "plain.h"

namespace {

// ------------------------------------------------------------------------------------------------ ggml blocks

// Below, b are the bytes of a block; names, layouts and the order of operations are those of `gguf_blocks.py`.

float half(const uint8_t* b) { return get(b, 0, FLOAT16); }

// A field of every byte of a run: bits `shift` and above of so many bytes.
template <typename F>
void each(const uint8_t* b, int64_t count, int shift, int mask, F f) {
    for (int64_t i = 0; i < count; i++) f(i, (b[i] >> shift) & mask);
}

void q4_1(const uint8_t* b, const int8_t*, float* out) {
    float d = half(b), m = half(b + 2);
    for (int side = 0; side < 2; side++) each(b + 4, 16, 4 * side, 15, [&](int64_t i, int q) { out[16 * side + i] = d * float(q) + m; });
}

template <bool MINIMUM>
void q5(const uint8_t* b, const int8_t*, float* out) {
    float d = half(b), m = MINIMUM ? half(b + 2) : 0;
    uint32_t high;
    std::memcpy(&high, b + (MINIMUM ? 4 : 2), sizeof high);
    for (int side = 0; side < 2; side++)
        each(b + (MINIMUM ? 8 : 6), 16, 4 * side, 15, [&](int64_t i, int q) {
            q |= int(high >> (16 * side + i) & 1) << 4;
            out[16 * side + i] = MINIMUM ? d * float(q) + m : d * float(q - 16);
        });
}

void q2_k(const uint8_t* b, const int8_t*, float* out) {
    float d = half(b + 80), dmin = half(b + 82);
    for (int64_t sub = 0; sub < 16; sub++) {  // of 16 elements
        float scale = d * float(b[sub] & 15), least = dmin * float(b[sub] >> 4);
        each(b + 16 + sub / 8 * 32 + sub % 2 * 16, 16, int(sub % 8 / 2 * 2), 3,
             [&](int64_t i, int q) { out[16 * sub + i] = scale * float(q) - least; });
    }
}

void q3_k(const uint8_t* b, const int8_t*, float* out) {
    float d = half(b + 108);
    for (int64_t sub = 0; sub < 16; sub++) {
        int low = (b[96 + sub % 8] >> (sub / 8 * 4)) & 15, high = (b[104 + sub % 4] >> (sub / 4 * 2)) & 3;
        float scale = d * float((low | high << 4) - 32);
        const uint8_t* third = b + sub % 2 * 16;
        each(b + 32 + sub / 8 * 32 + sub % 2 * 16, 16, int(sub % 8 / 2 * 2), 3, [&](int64_t i, int q) {
            out[16 * sub + i] = scale * float((q | ((third[i] >> sub / 2) & 1) << 2) - 4);
        });
    }
}

// Of sub-block `sub` of Q4_K and Q5_K, from their twelve bytes: the scale, or from four bytes further, the minimum.
int six_bits(const uint8_t* b, int64_t sub, bool minimum) {
    const uint8_t* first = b + (minimum ? 4 : 0);
    if (sub < 4) return first[sub] & 63;
    return ((b[8 + sub - 4] >> (minimum ? 4 : 0)) & 15) | first[sub - 4] >> 6 << 4;
}

template <bool FIFTH>
void q45_k(const uint8_t* b, const int8_t*, float* out) {
    float d = half(b), dmin = half(b + 2);
    for (int64_t sub = 0; sub < 8; sub++) {  // of 32 elements
        float scale = d * float(six_bits(b + 4, sub, false)), least = dmin * float(six_bits(b + 4, sub, true));
        each(b + (FIFTH ? 48 : 16) + sub / 2 * 32, 32, int(sub % 2 * 4), 15, [&](int64_t i, int q) {
            if (FIFTH) q |= ((b[16 + i] >> sub) & 1) << 4;
            out[32 * sub + i] = scale * float(q) - least;
        });
    }
}

void q6_k(const uint8_t* b, const int8_t*, float* out) {
    float d = half(b + 208);
    for (int64_t sub = 0; sub < 16; sub++) {
        float scale = d * float(int8_t(b[192 + sub]));
        const uint8_t* high = b + 128 + sub / 8 * 32 + sub % 2 * 16;
        each(b + sub / 8 * 64 + sub % 4 * 16, 16, int(sub % 8 / 4 * 4), 15, [&](int64_t i, int q) {
            out[16 * sub + i] = scale * float((q | ((high[i] >> sub % 8 / 2 * 2) & 3) << 4) - 32);
        });
    }
}

void iq4_xs(const uint8_t* b, const int8_t*, float* out) {
    constexpr float VALUES[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    float d = half(b);
    for (int64_t sub = 0; sub < 8; sub++) {
        int low = (b[4 + sub / 2] >> (sub % 2 * 4)) & 15, high = (b[2 + sub / 4] >> (sub % 4 * 2)) & 3;
        float scale = d * float((low | high << 4) - 32);
        for (int side = 0; side < 2; side++)
            each(b + 8 + 16 * sub, 16, 4 * side, 15, [&](int64_t i, int q) { out[32 * sub + 16 * side + i] = scale * VALUES[q]; });
    }
}

// Of the kinds below, eight elements are points of a grid, which numbers them: one entry of it, or two of four points.

uint64_t entry(const int8_t* grid, int64_t number) {
    uint64_t points;
    std::memcpy(&points, grid + 8 * number, sizeof points);
    return points;
}

uint64_t two_entries(const int8_t* grid, int64_t number, int64_t next) {
    uint32_t low, high;
    std::memcpy(&low, grid + 4 * number, sizeof low), std::memcpy(&high, grid + 4 * next, sizeof high);
    return low | uint64_t(high) << 32;
}

// (point + shift) scale of eight points, the i-th with bit i of `signs` as its sign.
void put_points(uint64_t points, int signs, float shift, float scale, float* out) {
    const __m256i places = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24), sign = _mm256_set1_epi32(int(0x80000000));
    __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(int64_t(points))));
    v = _mm256_mul_ps(_mm256_add_ps(v, _mm256_set1_ps(shift)), _mm256_set1_ps(scale));
    __m256i minus = _mm256_and_si256(_mm256_sllv_epi32(_mm256_set1_epi32(signs), places), sign);
    _mm256_storeu_ps(out, _mm256_xor_ps(v, _mm256_castsi256_ps(minus)));
}

int eighth_sign(uint32_t seven) { return int(seven & 127) | __builtin_parity(seven & 127) << 7; }  // which makes them even

int nibble(const uint8_t* b, int64_t i) { return b[i / 2] >> (i % 2 * 4) & 15; }

template <typename Word>
Word word_at(const uint8_t* b, int64_t i) {
    Word word;
    std::memcpy(&word, b + i * sizeof word, sizeof word);
    return word;
}

void iq2_xxs(const uint8_t* b, const int8_t* grid, float* out) {
    for (int64_t i = 0; i < 32; i++) {  // eights
        uint32_t word = word_at<uint32_t>(b + 2, i / 4 * 2 + 1);
        float scale = half(b) * (float(word >> 28) + 0.5f) / 4;
        put_points(entry(grid, b[2 + i / 4 * 8 + i % 4]), eighth_sign(word >> i % 4 * 7), 0, scale, out + 8 * i);
    }
}

void iq2_xs(const uint8_t* b, const int8_t* grid, float* out) {
    for (int64_t i = 0; i < 32; i++) {
        uint32_t word = word_at<uint16_t>(b + 2, i);
        float scale = half(b) * (float(nibble(b + 66, i / 2)) + 0.5f) / 4;
        put_points(entry(grid, word & 511), eighth_sign(word >> 9), 0, scale, out + 8 * i);
    }
}

void iq2_s(const uint8_t* b, const int8_t* grid, float* out) {
    for (int64_t i = 0; i < 32; i++) {
        int64_t number = b[2 + i] | (b[66 + i / 4] >> i % 4 * 2 & 3) << 8;
        float scale = half(b) * (float(nibble(b + 74, i / 2)) + 0.5f) / 4;
        put_points(entry(grid, number), b[34 + i], 0, scale, out + 8 * i);
    }
}

void iq3_xxs(const uint8_t* b, const int8_t* grid, float* out) {
    for (int64_t i = 0; i < 32; i++) {
        uint32_t word = word_at<uint32_t>(b + 66, i / 4);
        float scale = half(b) * (float(word >> 28) + 0.5f) / 2;
        put_points(two_entries(grid, b[2 + 2 * i], b[3 + 2 * i]), eighth_sign(word >> i % 4 * 7), 0, scale, out + 8 * i);
    }
}

void iq3_s(const uint8_t* b, const int8_t* grid, float* out) {
    auto number = [&](int64_t k) { return b[2 + k] | (b[66 + k / 8] >> k % 8 & 1) << 8; };
    for (int64_t i = 0; i < 32; i++) {
        float scale = half(b) * float(2 * nibble(b + 106, i / 4) + 1);
        put_points(two_entries(grid, number(2 * i), number(2 * i + 1)), b[74 + i], 0, scale, out + 8 * i);
    }
}

void iq1_s(const uint8_t* b, const int8_t* grid, float* out) {
    for (int64_t i = 0; i < 32; i++) {
        int word = word_at<uint16_t>(b + 34, i / 4);
        float scale = half(b) * float(2 * (word >> 12 & 7) + 1), shift = 0.125f - 0.25f * float(word >> 15);
        put_points(entry(grid, b[2 + i] | (word >> i % 4 * 3 & 7) << 8), 0, shift, scale, out + 8 * i);
    }
}

void iq1_m(const uint8_t* b, const int8_t* grid, float* out) {
    auto words = [&](int64_t i) { return int(word_at<uint16_t>(b + 48, i)); };
    uint16_t bits = uint16_t(words(0) >> 12 | words(1) >> 12 << 4 | words(2) >> 12 << 8 | words(3) >> 12 << 12);
    float d = get(&bits, 0, FLOAT16);
    for (int64_t sub = 0; sub < 16; sub++) {  // of 16 elements
        float scale = d * float(2 * (words(sub / 4) >> sub % 4 * 3 & 7) + 1);
        for (int64_t i = 2 * sub; i < 2 * sub + 2; i++) {
            int high = nibble(b + 32, i);
            put_points(entry(grid, b[i] | (high & 7) << 8), 0, 0.125f - 0.25f * float(high >> 3), scale, out + 8 * i);
        }
    }
}

// What Python calls a layout by; `operations.py` has the same order.
const struct {
    int64_t elements, bytes;
    void (*unpack)(const uint8_t*, const int8_t* grid, float*);
} BLOCKS[] = {{32, 20, q4_1},           {32, 22, q5<false>},  {32, 24, q5<true>}, {256, 84, q2_k},  {256, 110, q3_k},
              {256, 144, q45_k<false>}, {256, 176, q45_k<true>}, {256, 210, q6_k}, {256, 136, iq4_xs}, {256, 110, iq3_s},
              {256, 98, iq3_xxs},       {256, 82, iq2_s},     {256, 74, iq2_xs},  {256, 66, iq2_xxs}, {256, 56, iq1_m},
              {256, 50, iq1_s}};

// ------------------------------------------------------------------------------------------------ rows

enum Layout { FP8, CODE4, INT4, INT8, GGML };  // GGML and above: BLOCKS

enum ScaleType { E4M3 = 3, E8M0 = 4 };  // beside those of numbers.h

struct Stored {
    int64_t layout;
    const uint8_t* codes;
    const void* scale;  // (rows / high, columns / wide), both rounded up; not of ggml blocks
    int scale_type;
    const void* aside;  // fp32 numbers of the codes, 256 or 16; of whole numbers their zeros, as the scales, or null; a grid
    int64_t high, wide, rows, columns;
};

float power(int exponent) { return std::ldexp(1.f, exponent); }

float scale_at(const Stored& w, int64_t i) {
    if (w.scale_type < E4M3) return get(w.scale, i, w.scale_type);
    int code = static_cast<const uint8_t*>(w.scale)[i];
    if (w.scale_type == E8M0) return code == 255 ? NAN : power(code - 127);
    int exponent = code >> 3 & 15, fraction = code & 7;
    float magnitude = (code & 127) == 127 ? NAN : exponent ? power(exponent - 10) * float(8 + fraction) : power(-9) * float(fraction);
    return code & 128 ? -magnitude : magnitude;
}

// Of whole numbers: what is subtracted before they are scaled.
float zero_at(const Stored& w, int64_t i) {
    if (w.layout == INT8) return w.aside ? static_cast<const int8_t*>(w.aside)[i] : 0;
    if (w.layout == INT4) return w.aside ? static_cast<const uint8_t*>(w.aside)[i] : 8;
    return 0;
}

using Whole = std::integral_constant<int64_t, 8>;

// What eight codes stand for from column k on, of which `count` are there: a Whole, or fewer.
template <typename Count>
__m256 values(const Stored& w, const uint8_t* codes, int64_t k, Count count) {
    const float* table = static_cast<const float*>(w.aside);
    if (w.layout == FP8 || w.layout == INT8) {
        uint64_t some = 0;
        std::memcpy(&some, codes + k, count);
        __m128i eight = _mm_cvtsi64_si128(int64_t(some));
        if (w.layout == INT8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(eight), 4);
    }
    uint32_t some = 0;
    std::memcpy(&some, codes + k / 2, (count + 1) / 2);
    __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(int(some)), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    if (w.layout == INT4) return _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32(15)));
    __m256 lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), code);  // the lowest three bits count
    __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), code);
    return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));  // the fourth as a sign
}

// Row `row` in fp32; `out` has `room` for it.
template <int LAYOUT>
void read_row(Stored w, int64_t row, float* out) {
    w.layout = LAYOUT;
    int64_t groups = (w.columns + w.wide - 1) / w.wide, scales = row / w.high * groups;
    const uint8_t* codes = w.codes + row * (w.layout == FP8 || w.layout == INT8 ? w.columns : (w.columns + 1) / 2);
    auto scaled = [&](int64_t k, auto count, __m256 scale, __m256 zero) {
        _mm256_storeu_ps(out + k, _mm256_mul_ps(_mm256_sub_ps(values(w, codes, k, count), zero), scale));
    };
    bool whole = w.wide % 8 == 0 || groups == 1;  // eights have one scale
    for (int64_t g = 0; whole && g < groups; g++) {
        __m256 scale = _mm256_set1_ps(scale_at(w, scales + g)), zero = _mm256_set1_ps(zero_at(w, scales + g));
        int64_t k = g * w.wide, last = std::min(k + w.wide, w.columns);
        for (; k + 8 <= last; k += 8) scaled(k, Whole(), scale, zero);
        if (k < last) scaled(k, last - k, scale, zero);
    }
    for (int64_t k = 0; !whole && k < w.columns; k += 8) {
        alignas(32) float scale[8] = {}, zero[8] = {};
        int64_t count = std::min<int64_t>(8, w.columns - k);
        for (int64_t i = 0; i < count; i++) {
            scale[i] = scale_at(w, scales + (k + i) / w.wide);
            zero[i] = zero_at(w, scales + (k + i) / w.wide);
        }
        scaled(k, count, _mm256_load_ps(scale), _mm256_load_ps(zero));
    }
}

void read_row(const Stored& w, int64_t row, float* out) {
    if (w.layout == FP8) return read_row<FP8>(w, row, out);
    if (w.layout == CODE4) return read_row<CODE4>(w, row, out);
    if (w.layout == INT4) return read_row<INT4>(w, row, out);
    if (w.layout == INT8) return read_row<INT8>(w, row, out);
    auto block = BLOCKS[w.layout - GGML];
    const uint8_t* b = w.codes + row * (w.columns / block.elements) * block.bytes;
    for (int64_t k = 0; k < w.columns; k += block.elements, b += block.bytes)
        block.unpack(b, static_cast<const int8_t*>(w.aside), out + k);
}

int64_t room(int64_t columns) { return (columns + 255) / 256 * 256; }

// Rows first to last of a matrix, rounded to a type.
void rows_of_stored(int64_t layout, const uint8_t* codes, const void* scale, int scale_type, const void* aside, int64_t high,
                    int64_t wide, int64_t rows, int64_t columns, int64_t first, int64_t last, int type, void* out) {
    Stored w = {layout, codes, scale, scale_type, aside, high, wide, rows, columns};
    share(last - first, (last - first) * columns, [&](int64_t i, int64_t end) {
        std::vector<float> row(room(columns));
        for (; i < end; i++) {
            read_row(w, first + i, row.data());
            for (int64_t k = 0; k < columns; k += 8)
                put8(out, i * columns + k, type, _mm256_loadu_ps(&row[k]), columns - k);
        }
    });
}

// The product with up to FEW tokens (tokens, columns), summed in fp32.
void linear_stored(int64_t layout, const uint8_t* codes, const void* scale, int scale_type, const void* aside, int64_t high,
                   int64_t wide, int64_t rows, int64_t columns, const void* x, int type, int64_t tokens, const void* bias,
                   void* out) {
    Stored w = {layout, codes, scale, scale_type, aside, high, wide, rows, columns};
    int64_t padded = (columns + 7) / 8 * 8;
    std::vector<float> wide_x = widened(x, 0, type, tokens, columns);
    share((rows + ROWS - 1) / ROWS, rows * columns, [&](int64_t block, int64_t last) {
        std::vector<float> row(room(columns));
        for (; block < last; block++) {
            int64_t first = block * ROWS, count = std::min(ROWS, rows - first);
            float y[FEW * ROWS] = {}, offset[ROWS] = {};
            for (int64_t i = 0; i < count; i++) {
                read_row(w, first + i, row.data());
                offset[i] = bias ? get(bias, first + i, type) : 0;
                for (int64_t t = 0; t < tokens; t += ABREAST)
                    dot_row_of<FLOAT32>(tokens - t, row.data(), 0, columns, &wide_x[t * padded], padded, y + t * ROWS + i);
            }
            for (int64_t t = 0; t < tokens; t++)
                put8(out, t * rows + first, type, _mm256_add_ps(_mm256_loadu_ps(y + t * ROWS), _mm256_loadu_ps(offset)), count);
        }
    });
}

}  // namespace
