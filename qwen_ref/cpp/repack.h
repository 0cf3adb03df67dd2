// Matrices of 4- and 8-bit codes as AWQ and GPTQ store them, transposed: at the speed of memory.
//
// Both keep several codes in a word of 32 bits and the inputs of a matrix one below the other; `packed.h` wants the inputs of
// an output side by side. Sixteen lines of sixteen words are transposed at a time, or several times as many, so that whole cache
// lines are read and written. What is written is not needed soon and goes past the caches.
#pragma once

#include "numbers.h"

namespace {

constexpr int64_t LINE = 16;  // words of a cache line
constexpr int64_t OUTPUT_OF_NIBBLE[] = {0, 2, 4, 6, 1, 3, 5, 7};  // of an AWQ word

struct Words {
    const uint32_t* data;
    int64_t rows, columns;

    // Eight words of a row, zeros behind the matrix's last row and column; those of the next line are asked for.
    __m256i get8(int64_t row, int64_t column) const {
        if (row >= rows || column >= columns) return _mm256_setzero_si256();
        const uint32_t* from = data + row * columns + column;
        _mm_prefetch(reinterpret_cast<const char*>(from + LINE), _MM_HINT_T1);
        if (column + 8 <= columns) return load(from);
        uint32_t some[8] = {};
        std::memcpy(some, from, (columns - column) * sizeof *from);
        return load(some);
    }
};

// Nibble j of register i and nibble i of register j change places, in each of their eight words: halves of the words are
// exchanged, then quarters, then nibbles (Warren, Hacker's Delight, section 7-3).
void transpose_nibbles(__m256i* v) {
    constexpr uint32_t MASKS[] = {0, 0x0f0f0f0f, 0x00ff00ff, 0, 0x0000ffff};
#pragma GCC unroll 3
    for (int half : {4, 2, 1})
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            if (i & half) continue;
            __m256i mask = _mm256_set1_epi32(int(MASKS[half])), high = _mm256_srli_epi32(v[i], 4 * half);
            __m256i exchanged = _mm256_and_si256(_mm256_xor_si256(high, v[i + half]), mask);
            v[i + half] = _mm256_xor_si256(v[i + half], exchanged);
            v[i] = _mm256_xor_si256(v[i], _mm256_slli_epi32(exchanged, 4 * half));
        }
}

// `lines` times sixteen registers of eight words, transposed: so many lines each for `rows` rows that lie `stride` bytes apart,
// or their first bytes. One row after the other: memory takes long runs faster than scattered lines.
void put_rows(__m256i* words, int64_t lines, uint8_t* out, int64_t stride, int64_t rows, int64_t bytes, bool whole) {
    for (int64_t part = 0; part < 2 * lines; part++) transpose_words(words + 8 * part);
    for (int64_t j = 0; j < std::min<int64_t>(rows, 8); j++)
        for (int64_t part = 0; part < 2 * lines; part++) {
            uint8_t* to = out + j * stride + 32 * part;
            if (whole) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), words[8 * part + j]);
            else if (bytes > 32 * part) std::memcpy(to, words + 8 * part + j, std::min<int64_t>(bytes - 32 * part, 32));
        }
}

// `columns` times PER rows of `width` bytes. get(g, column, v) makes their words g for eight columns: PER registers, of which
// the i-th is for row `row_of[i]` of each column. `strips`: LINE columns from top to bottom, then the next ones; each piece of
// the work has a `get` of its own, in which it may keep them.
template <int64_t PER, typename F>
void transpose(int64_t columns, const int64_t* row_of, uint8_t* out, int64_t width, const F& shared, bool strips = false) {
    bool aligned = (reinterpret_cast<uintptr_t>(out) | uintptr_t(width)) % 64 == 0;
    constexpr int64_t RUN = 4;  // lines written to a row at a time: single ones are slow, more than the first-level cache holds too
    int64_t across = (columns + LINE - 1) / LINE, down = (width + 64 * RUN - 1) / (64 * RUN);
    // A byte that is moved takes an eighth of a number that is computed: of zeros and scales, a second thread is of no use.
    share(down * across, columns * PER * width / 8, [&](int64_t tile, int64_t last) {
        for (F get = shared; tile < last; tile++) {
            int64_t first = (strips ? tile % down : tile / across) * LINE * RUN;
            int64_t column = (strips ? tile / down : tile % across) * LINE;
            int64_t bytes = std::min(width - 4 * first, 64 * RUN), lines = (bytes + 63) / 64;
            __m256i words[2][PER][LINE * RUN];
            for (int64_t g = 0; g < LINE * lines; g++)
                for (int64_t half = 0; half < 2; half++) {
                    __m256i v[PER];
                    get(first + g, column + 8 * half, v);
                    for (int64_t i = 0; i < PER; i++) words[half][i][g] = v[i];
                }
            for (int64_t at = column, half = 0; half < 2 && at < columns; at += 8, half++)
                for (int64_t i = 0; i < PER; i++)
                    put_rows(words[half][i], lines, out + (at * PER + row_of[i]) * width + 4 * first, PER * width, columns - at,
                             bytes, aligned);
        }
        _mm_sfence();  // what went past the caches is there before another thread looks
    });
}

// AWQ: (inputs, outputs / 8) words -> (outputs, ceil(inputs / 2)) bytes of two inputs, the first in the low four bits.
void repack_awq(const uint32_t* words, int64_t inputs, int64_t columns, uint8_t* out) {
    Words from = {words, inputs, columns};
    transpose<8>(columns, OUTPUT_OF_NIBBLE, out, (inputs + 1) / 2, [&](int64_t group, int64_t column, __m256i* v) {
        for (int64_t k = 0; k < 8; k++) v[k] = from.get8(8 * group + k, column);
        transpose_nibbles(v);
    });
}

// GPTQ: (inputs / PER, outputs) words -> (outputs, inputs / PER) words, PER = 32 / bits, the bits of `flipped` changed in each.
// `order`: input k of the result is input order[k] of the matrix; null as stored. 1 if it names an input that there is not.
int repack_gptq(const uint32_t* words, int64_t rows, int64_t columns, int64_t flipped, int bits, const int64_t* order, uint8_t* out) {
    const int64_t per = 32 / bits, inputs = rows * per, row = 0;
    const __m256i flip = _mm256_set1_epi32(int(flipped)), mask = _mm256_set1_epi32((1 << bits) - 1);
    Words from = {words, rows, columns};
    if (!order) {
        transpose<1>(columns, &row, out, 4 * rows, [&](int64_t group, int64_t column, __m256i* v) {
            *v = _mm256_xor_si256(from.get8(group, column), flip);
        });
        return 0;
    }
    struct Place { int64_t word, shift; };  // of a code in a strip
    std::vector<Place> places;
    for (int64_t k = 0; k < inputs; k++) {
        if (order[k] < 0 || order[k] >= inputs) return 1;
        places.push_back({order[k] / per * LINE, bits * (order[k] % per)});
    }
    // Lines of rows far apart are slow to fetch and drive each other out of the caches: a strip of them is copied together first.
    auto get = [&, strip = std::vector<uint32_t>(), held = int64_t(-1)](int64_t group, int64_t column, __m256i* v) mutable {
        if (held != column / LINE) {
            held = column / LINE, strip.resize(rows * LINE);
            for (int64_t i = 0; i < rows * LINE; i += 8) store(&strip[i], from.get8(i / LINE, held * LINE + i % LINE));
        }
        *v = flip;
        for (int64_t j = 0; group < rows && j < per; j++) {
            Place place = places[group * per + j];
            __m256i code = _mm256_srl_epi32(load(&strip[place.word + column % LINE]), _mm_cvtsi64_si128(place.shift));
            *v = _mm256_xor_si256(*v, _mm256_sll_epi32(_mm256_and_si256(code, mask), _mm_cvtsi64_si128(bits * j)));
        }
    };
    transpose<1>(columns, &row, out, 4 * rows, get, true);
    return 0;
}

// Zeros of AWQ and GPTQ: (groups, columns) words -> (outputs, groups) bytes, `more` added to each. 1 if all are in the middle.
int repack_zeros(const uint32_t* words, int64_t groups, int64_t columns, int bits, int awq, int64_t more, uint8_t* out) {
    const int64_t per = 32 / bits;
    const uint32_t mask = (1u << bits) - 1, middle = 1u << (bits - 1);
    uint32_t differ = 0;
    std::vector<uint32_t> of_column(groups);
    for (int64_t column = 0; column < columns; column++) {
        for (int64_t g = 0; g < groups; g++) of_column[g] = words[g * columns + column];
        for (int64_t i = 0; i < per; i++) {
            uint8_t* row = out + (column * per + (awq ? OUTPUT_OF_NIBBLE[i] : i)) * groups;
            for (int64_t g = 0; g < groups; g++) {
                uint32_t zero = ((of_column[g] >> bits * i) + uint32_t(more)) & mask;
                row[g] = uint8_t(zero), differ |= zero ^ middle;
            }
        }
    }
    return !differ;
}

// Numbers of 16 bits, (rows, 2 columns) -> (2 columns, rows), with two neighbours of a row taken as a word.
void repack_halves(const uint32_t* words, int64_t rows, int64_t columns, uint8_t* out) {
    Words from = {words, rows, columns};
    const int64_t row_of[] = {0, 1};
    transpose<2>(columns, row_of, out, 2 * rows, [&](int64_t group, int64_t column, __m256i* v) {
        __m256i upper = from.get8(2 * group, column), lower = from.get8(2 * group + 1, column);
        v[0] = _mm256_blend_epi16(upper, _mm256_slli_epi32(lower, 16), 0xaa);
        v[1] = _mm256_blend_epi16(_mm256_srli_epi32(upper, 16), lower, 0xaa);
    });
}

}  // namespace
