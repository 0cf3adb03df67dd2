// y = x W^T + bias with x in bfloat16 and a matrix of any layout, on a CPU that has a matrix unit (Intel AMX): one instruction
// multiplies 16 rows of 32 columns with as many tokens, and adds to 16 x 16 sums in fp32.
//
// PANEL_ROWS rows are made bfloat16 in the cache, once for all tokens, and lie there as the unit reads them; so does x, whose
// columns it takes in pairs. Nothing else is rounded: the numbers are the formula's, but for the order of their sums.
#pragma once

#include "packed.h"
#include "stored.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef __AMX_BF16__

constexpr int64_t SIDE = 16;        // rows of weights, or tokens, of a tile
constexpr int64_t DEEP = 32;        // columns of a tile
constexpr int64_t DEPTH = 8;        // tiles of a panel's half that stay in the first-level cache, with the other half's
constexpr int64_t HALVES = 2;       // of a panel, and of a pair of token tiles: four tiles of sums, and two of each factor
constexpr int64_t PANEL_ROWS = HALVES * SIDE, TOKENS_AT_ONCE = HALVES * SIDE;
constexpr int64_t HELD = 1 << 14;   // lines of panels in the second-level cache: 1 MB

struct alignas(64) Line {
    uint16_t numbers[DEEP];
};

// Whether this process may use the unit: Linux keeps its registers only for those that have asked.
bool tiles_granted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}

void configure_tiles() {
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};  // of a row
        uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = sizeof(Line), config.rows[i] = SIDE;
    asm volatile("" ::: "memory");  // GCC 12 takes no more than the first eight bytes for what is read
    _tile_loadconfig(&config);
}

// A tile of SIDE tokens from `token` on, DEEP columns from `k` on, of x (tokens, columns), `stride` numbers from one token to
// the next: as (pair of columns, token, 2), zeros where there are none.
void pair_tokens(const uint16_t* x, int64_t stride, int64_t token, int64_t tokens, int64_t k, int64_t columns, Line* out) {
    for (int64_t from = 0; from < SIDE; from += 8)
        for (int64_t part = 0; part < DEEP; part += 16) {  // eight pairs of eight tokens
            __m256i v[8];
            for (int64_t i = 0; i < 8; i++) {
                int64_t t = token + from + i, first = k + part, count = t < tokens ? std::min<int64_t>(16, columns - first) : 0;
                uint16_t some[16] = {};
                if (count > 0 && count < 16) std::memcpy(some, x + t * stride + first, count * 2);
                v[i] = load(count == 16 ? x + t * stride + first : some);
            }
            transpose_words(v);
            for (int64_t i = 0; i < 8; i++) store(out[part / 2 + i].numbers + 2 * from, v[i]);
        }
}

// Sixteen numbers in bfloat16: `bfloat16_bits` of twice as many.
__m256i bfloat16_of(__m512 v) {
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

// A row in bfloat16, DEEP columns to each line of a panel's row; zeros behind the last.
void read_line(const Stored& w, int64_t row, float* values, Line* out) {
    int64_t deep = (w.columns + DEEP - 1) / DEEP;
    read_row(w, row, values);
    std::fill(values + w.columns, values + deep * DEEP, 0.f);
    for (int64_t d = 0; d < deep; d++)
        for (int64_t k = 0; k < DEEP; k += 16)
            store(out[d * PANEL_ROWS].numbers + k, bfloat16_of(_mm512_loadu_ps(values + d * DEEP + k)));
}

// The same of codes of four bits: a group has sixteen values, and its codes are looked up.
void look_up_line(const Stored& w, int64_t row, Line* out) {
    int64_t groups = (w.columns + w.wide - 1) / w.wide, scales = row / w.high * groups;
    const uint8_t* codes = w.codes + row * (w.columns / 2);
    const __m512 numbers = w.layout == CODE4 ? _mm512_loadu_ps(w.aside)
        : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t g = 0; g < groups; g++) {
        __m512 less = _mm512_sub_ps(numbers, _mm512_set1_ps(zero_at(w, scales + g)));
        __m512i table = _mm512_castsi256_si512(bfloat16_of(_mm512_mul_ps(less, _mm512_set1_ps(scale_at(w, scales + g)))));
        for (int64_t d = g * w.wide / DEEP, last = std::min((g + 1) * w.wide, w.columns) / DEEP; d < last; d++) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + d * DEEP / 2 + AHEAD), _MM_HINT_T1);
            __m256i pairs = _mm256_cvtepu8_epi16(load_half(codes + d * DEEP / 2));
            __m256i each = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi16(0x0f0f));
            _mm512_store_si512(&out[d * PANEL_ROWS], _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(each), table));
        }
    }
}

// The same of codes of eight bits.
void scale_line(const Stored& w, int64_t row, Line* out) {
    int64_t groups = (w.columns + w.wide - 1) / w.wide, scales = row / w.high * groups;
    const uint8_t* codes = w.codes + row * w.columns;
    for (int64_t g = 0; g < groups; g++) {
        const __m512 scale = _mm512_set1_ps(scale_at(w, scales + g)), zero = _mm512_set1_ps(zero_at(w, scales + g));
        for (int64_t d = g * w.wide / DEEP, last = std::min((g + 1) * w.wide, w.columns) / DEEP; d < last; d++) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + d * DEEP + AHEAD), _MM_HINT_T1);
            for (int64_t k = 0; k < DEEP; k += 16) {
                __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_half(codes + d * DEEP + k)));
                store(out[d * PANEL_ROWS].numbers + k, bfloat16_of(_mm512_mul_ps(_mm512_sub_ps(code, zero), scale)));
            }
        }
    }
}

// A panel from row `row` on in bfloat16, as (block of DEEP columns, row, column); zeros where there are no rows.
void read_panel(const Stored& w, int64_t row, float* values, Line* out) {
    bool few = w.layout == INT4 || w.layout == CODE4, whole = w.columns % DEEP == 0 && (w.wide % DEEP == 0 || w.wide >= w.columns);
    for (int64_t r = 0; r < PANEL_ROWS; r++, out++) {
        if (row + r >= w.rows)
            for (int64_t d = 0; d < (w.columns + DEEP - 1) / DEEP; d++) out[d * PANEL_ROWS] = {};
        else if (few && whole) look_up_line(w, row + r, out);
        else if (w.layout == INT8 && whole) scale_line(w, row + r, out);
        else read_line(w, row + r, values, out);
    }
}

// sums (half of rows, half of tokens, SIDE rows, SIDE tokens) += `count` blocks of columns of a panel and of two token tiles,
// which lie `stride` lines apart from one block to the next.
void multiply_tiles(const Line* w, const Line* x, int64_t stride, int64_t count, float* sums) {
    constexpr int64_t BYTES = sizeof(Line), SUMS = SIDE * SIDE;
    asm volatile("" ::: "memory");  // a compiler does not know that tiles are read from memory
    _tile_loadd(0, sums, BYTES);
    _tile_loadd(1, sums + SUMS, BYTES);
    _tile_loadd(2, sums + 2 * SUMS, BYTES);
    _tile_loadd(3, sums + 3 * SUMS, BYTES);
    for (int64_t i = 0; i < count; i++, w += PANEL_ROWS, x += stride) {
        _tile_loadd(4, w, BYTES);
        _tile_loadd(6, x, BYTES);
        _tile_loadd(7, x + SIDE, BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, w + SIDE, BYTES);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, BYTES);
    _tile_stored(1, sums + SUMS, BYTES);
    _tile_stored(2, sums + 2 * SUMS, BYTES);
    _tile_stored(3, sums + 3 * SUMS, BYTES);
    asm volatile("" ::: "memory");
}

// Rows that are multiplied while tokens are in the first-level cache, and their sums with TOKENS_AT_ONCE of them.
struct Panels {
    const Stored& w;
    int64_t most, deep;                 // panels; blocks of DEEP columns
    Aligned<Line> weights, sums;        // (panel, block, row); (panel, half of rows, half of tokens, row) of SIDE sums
    std::vector<float> values, offset;  // of one row; of all: the bias
    int64_t row = 0, count = 0;         // the first, and how many there are

    Panels(const Stored& w, int64_t most)
        : w(w), most(most), deep((w.columns + DEEP - 1) / DEEP), weights(most * deep * PANEL_ROWS),
          sums(most * HALVES * HALVES * SIDE), values(room(w.columns)), offset(most * PANEL_ROWS) {}

    float* of(int64_t panel) const { return reinterpret_cast<float*>(&sums[panel * HALVES * HALVES * SIDE]); }

    void read(int64_t first, const void* bias) {
        row = first, count = std::min(most * PANEL_ROWS, w.rows - first);
        for (int64_t p = 0; p * PANEL_ROWS < count; p++)
            read_panel(w, row + p * PANEL_ROWS, values.data(), &weights[p * deep * PANEL_ROWS]);
        for (int64_t r = 0; r < most * PANEL_ROWS; r++) offset[r] = bias && r < count ? get(bias, row + r, BFLOAT16) : 0;
    }

    // With TOKENS_AT_ONCE, (block of DEEP columns, half).
    void multiply(const Line* tokens) const {
        std::memset(static_cast<void*>(sums.get()), 0, most * HALVES * HALVES * SIDE * sizeof(Line));
        for (int64_t d = 0; d < deep; d += DEPTH)
            for (int64_t p = 0; p * PANEL_ROWS < count; p++)
                multiply_tiles(&weights[(p * deep + d) * PANEL_ROWS], tokens + d * HALVES * SIDE, HALVES * SIDE,
                               std::min(DEPTH, deep - d), of(p));
    }

    // The sums of the first so many tokens to out (token, row): eight rows of eight tokens at a time.
    void write(int64_t tokens, uint16_t* out) const {
        for (int64_t t = 0; t < tokens; t += 8)
            for (int64_t r = 0; r < count; r += 8) {
                const float* from = of(r / PANEL_ROWS) + (r % PANEL_ROWS / SIDE * HALVES + t / SIDE) * SIDE * SIDE;
                __m256i v[8];
                for (int64_t i = 0; i < 8; i++) v[i] = load(from + (r % SIDE + i) * SIDE + t % SIDE);
                transpose_words(v);
                for (int64_t i = 0; i < std::min<int64_t>(8, tokens - t); i++) {
                    __m256 y = _mm256_add_ps(_mm256_castsi256_ps(v[i]), _mm256_loadu_ps(&offset[r]));
                    put8(out, (t + i) * w.rows + row + r, BFLOAT16, y, count - r);
                }
            }
    }
};

// `linear_packed` or `linear_stored` of bfloat16. `paired` has room for CHUNK tokens, or all if they are fewer: as
// (TOKENS_AT_ONCE, block of DEEP columns, half), whole ones.
void linear_tiles(int64_t layout, const uint8_t* codes, const void* scale, int scale_type, const void* aside, int64_t high,
                  int64_t wide, int64_t rows, int64_t columns, const uint16_t* x, int64_t tokens, const void* bias,
                  Line* paired, uint16_t* out) {
    Stored w = {layout, codes, scale, scale_type, aside, high, wide, rows, columns};
    int64_t deep = (columns + DEEP - 1) / DEEP, tiles = deep * HALVES;  // of TOKENS_AT_ONCE
    // What the second-level cache holds, and leaves for other threads.
    int64_t fit = std::min(HELD / (deep * PANEL_ROWS), rows / (PANEL_ROWS * PARTS * omp_get_max_threads()));
    int64_t most = std::max<int64_t>(std::min<int64_t>(fit, 4), 1), step = most * PANEL_ROWS;
    for (int64_t start = 0; start < tokens; start += CHUNK) {
        int64_t count = std::min(tokens - start, CHUNK), pairs = (count + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
        share(pairs * tiles, count * columns, [&](int64_t i, int64_t last) {
            for (; i < last; i++)
                pair_tokens(x + start * columns, columns, (i / tiles * HALVES + i % HALVES) * SIDE, count,
                            i % tiles / HALVES * DEEP, columns, &paired[i * SIDE]);
        });
        share((rows + step - 1) / step, count * rows * columns, [&](int64_t part, int64_t last) {
            Panels panels(w, most);
            configure_tiles();
            for (; part < last; part++) {
                panels.read(part * step, bias);
                for (int64_t t = 0; t < count; t += TOKENS_AT_ONCE) {
                    panels.multiply(&paired[t / TOKENS_AT_ONCE * tiles * SIDE]);
                    panels.write(std::min(TOKENS_AT_ONCE, count - t), out + (start + t) * rows);
                }
            }
            _tile_release();
        }, MANY_PARTS);
    }
}

#else

bool tiles_granted() { return false; }

#endif

}  // namespace
