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

// What `transpose` writes: `columns` times PER rows of `width` bytes. get(g, column, v) makes words g of LINE columns: PER
// registers for the first eight and PER for the others, of which the i-th is for row `row_of[i]` of each column.
template <int64_t PER>
struct Rows {
    static constexpr int64_t RUN = 4;  // lines written to a row at a time: single ones are slow, and many leave the first cache
    uint8_t* out;
    int64_t columns, width;
    const int64_t* row_of;

    int64_t across() const { return (columns + LINE - 1) / LINE; }
    int64_t down() const { return (width + 64 * RUN - 1) / (64 * RUN); }
    int64_t numbers() const { return columns * PER * width / 8; }  // a byte that is moved takes an eighth of a number computed

    // RUN lines from line RUN * y on of the rows of LINE columns from LINE * x on.
    template <typename F>
    void tile(int64_t x, int64_t y, F& get) const {
        bool aligned = (reinterpret_cast<uintptr_t>(out) | uintptr_t(width)) % 64 == 0;
        int64_t first = y * LINE * RUN, column = x * LINE;
        int64_t bytes = std::min(width - 4 * first, 64 * RUN), lines = (bytes + 63) / 64;
        __m256i words[2][PER][LINE * RUN];
        for (int64_t g = 0; g < LINE * lines; g++) {
            __m256i v[2][PER];
            get(first + g, column, v);
            for (int64_t half = 0; half < 2; half++)
                for (int64_t i = 0; i < PER; i++) words[half][i][g] = v[half][i];
        }
        for (int64_t at = column, half = 0; half < 2 && at < columns; at += 8, half++)
            for (int64_t i = 0; i < PER; i++)
                put_rows(words[half][i], lines, out + (at * PER + row_of[i]) * width + 4 * first, PER * width, columns - at,
                         bytes, aligned);
        _mm_sfence();  // what went past the caches is there before another thread looks
    }
};

template <int64_t PER, typename F>
void transpose(Rows<PER> rows, const F& get) {
    share(rows.down() * rows.across(), rows.numbers(), [&](int64_t tile, int64_t last) {
        for (; tile < last; tile++) rows.tile(tile % rows.across(), tile / rows.across(), get);
    });
}

// AWQ: (inputs, outputs / 8) words -> (outputs, ceil(inputs / 2)) bytes of two inputs, the first in the low four bits.
void repack_awq(const uint32_t* words, int64_t inputs, int64_t columns, uint8_t* out) {
    Words from = {words, inputs, columns};
    transpose(Rows<8>{out, columns, (inputs + 1) / 2, OUTPUT_OF_NIBBLE}, [&](int64_t group, int64_t column, auto v) {
        for (int64_t half = 0; half < 2; half++) {
            for (int64_t k = 0; k < 8; k++) v[half][k] = from.get8(8 * group + k, column + 8 * half);
            transpose_nibbles(v[half]);
        }
    });
}

// Codes of PARTS times LINE columns of a GPTQ matrix, a byte each: an input of another place is another row of them. Single
// lines of rows far apart are slow to fetch, so there are several.
struct Strip {
    static constexpr int64_t PARTS = 8, ROWS_AHEAD = 8;
    Words from;
    int bits;
    int64_t inputs = from.rows * (32 / bits);
    std::unique_ptr<uint8_t[]> codes{new uint8_t[PARTS * inputs * LINE]};  // (PARTS, inputs, LINE)

    void read(int64_t column) {
        for (int64_t row = 0; row < from.rows; row++)
            for (int64_t part = 0; part < PARTS; part++) {
                int64_t at = column + part * LINE;
                _mm_prefetch(reinterpret_cast<const char*>(from.data + (row + ROWS_AHEAD) * from.columns + at), _MM_HINT_T0);
                spread(row, at, &codes[(part * inputs + row * (32 / bits)) * LINE]);
            }
    }

    // The codes of LINE words of a row, those that each of them has first, then the second ones.
    void spread(int64_t row, int64_t column, uint8_t* to) const {
        const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        const __m256i pairs = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), mask = _mm256_set1_epi8(char((1 << bits) - 1));
        __m256i v[2];  // bytes 0, 1, 2 and 3 of eight words
        for (int64_t half = 0; half < 2; half++)
            v[half] = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(from.get8(row, column + 8 * half), bytes), pairs);
        const int64_t per = 8 / bits;  // codes of a byte
        for (int64_t byte = 0; byte < 2; byte++) {
            __m256i two = byte ? _mm256_unpackhi_epi64(v[0], v[1]) : _mm256_unpacklo_epi64(v[0], v[1]);  // and byte + 2
            for (int64_t i = 0; i < per; i++, two = _mm256_srli_epi16(two, bits)) {
                __m256i code = _mm256_and_si256(two, mask);
                store_half(to + (byte * per + i) * LINE, _mm256_castsi256_si128(code));
                store_half(to + ((byte + 2) * per + i) * LINE, _mm256_extracti128_si256(code, 1));
            }
        }
    }

    // The words of a part's columns that the inputs `order` names make.
    void words(int64_t part, const int64_t* order, __m256i* v) const {
        auto input = [&](int64_t k) { return load_half(&codes[(part * inputs + order[k]) * LINE]); };
        __m128i byte[4];
        for (int64_t i = 0; i < 4; i++)
            byte[i] = bits == 8 ? input(i) : _mm_or_si128(input(2 * i), _mm_slli_epi16(input(2 * i + 1), 4));
        __m128i low = _mm_unpacklo_epi8(byte[0], byte[1]), high = _mm_unpacklo_epi8(byte[2], byte[3]);
        v[0] = _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
        low = _mm_unpackhi_epi8(byte[0], byte[1]), high = _mm_unpackhi_epi8(byte[2], byte[3]);
        v[1] = _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
    }
};

// GPTQ: (inputs / PER, outputs) words -> (outputs, inputs / PER) words, PER = 32 / bits, the bits of `flipped` changed in each.
// `order`: input k of the result is input order[k] of the matrix; null as stored. 1 if it names an input that there is not.
int repack_gptq(const uint32_t* words, int64_t rows, int64_t columns, int64_t flipped, int bits, const int64_t* order, uint8_t* out) {
    const int64_t per = 32 / bits, row = 0;
    const __m256i flip = _mm256_set1_epi32(int(flipped));
    Words from = {words, rows, columns};
    Rows<1> to = {out, columns, 4 * rows, &row};
    if (!order) {
        transpose(to, [&](int64_t group, int64_t column, auto v) {
            for (int64_t half = 0; half < 2; half++) v[half][0] = _mm256_xor_si256(from.get8(group, column + 8 * half), flip);
        });
        return 0;
    }
    for (int64_t k = 0; k < rows * per; k++)
        if (order[k] < 0 || order[k] >= rows * per) return 1;
    share((to.across() + Strip::PARTS - 1) / Strip::PARTS, to.numbers(), [&](int64_t first, int64_t last) {
        Strip strip = {from, bits};
        auto get = [&](int64_t group, int64_t column, auto v) {
            v[0][0] = v[1][0] = flip;
            if (group >= rows) return;
            strip.words(column / LINE % Strip::PARTS, order + group * per, v[0]);
            for (int64_t half = 0; half < 2; half++) v[half][0] = _mm256_xor_si256(v[half][0], flip);
        };
        for (first *= Strip::PARTS, last = std::min(last * Strip::PARTS, to.across()); first < last; first++) {
            if (first % Strip::PARTS == 0) strip.read(first * LINE);
            for (int64_t y = 0; y < to.down(); y++) to.tile(first, y, get);
        }
    });
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
    transpose(Rows<2>{out, columns, 2 * rows, row_of}, [&](int64_t group, int64_t column, auto v) {
        for (int64_t half = 0; half < 2; half++, column += 8) {
            __m256i upper = from.get8(2 * group, column), lower = from.get8(2 * group + 1, column);
            v[half][0] = _mm256_blend_epi16(upper, _mm256_slli_epi32(lower, 16), 0xaa);
            v[half][1] = _mm256_blend_epi16(_mm256_srli_epi32(upper, 16), lower, 0xaa);
        }
    });
}

}  // namespace
