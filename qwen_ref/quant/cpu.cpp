// What a quantised model does most on a CPU with AVX2: products with matrices of 4- and 8-bit codes, and what lies between.
//
// y = x W^T + bias is multiplied as integers. The codes are taken as they are; x is rounded to 16 bits under one scale for
// every BLOCK columns of a token, which is finer than bfloat16. One instruction then multiplies sixteen columns and adds
// them in pairs: twice the speed of fp32. With one token the codes are widened to 16 bits in a register, at the speed of
// memory; with many, PANEL rows at a time are widened to the first-level cache, once for all tokens, and laid so that a
// register holds one pair of columns of eight rows: their sums never have to be added across a register.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int64_t BLOCK = 256;  // columns under one scale of x; their largest sum, 256 * 255 * 32767, fits 32 bits
constexpr int64_t STEP = 32;    // the smallest group; others are whole multiples of it
constexpr int64_t PANEL = 16;   // rows that one thread takes at a time
constexpr int64_t TILE = 6;     // tokens multiplied with them at once: 2 * 6 sums in registers
constexpr int64_t CHUNK = 512;  // tokens rounded together
constexpr int64_t AHEAD = 2048; // bytes of codes asked for before they are read
constexpr int64_t MOST = 1024;  // numbers of a head that is normed and rotated at once
constexpr int64_t SMALL = 1 << 15; // numbers that one thread has done before a second has begun

// ------------------------------------------------------------------------------------------------ numbers

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

__m256i load(const void* data) { return _mm256_loadu_si256(static_cast<const __m256i*>(data)); }
__m128i load_half(const void* data) { return _mm_loadu_si128(static_cast<const __m128i*>(data)); }

// To nearest, ties to even; a NaN stays one.
__m256i bfloat16_bits(__m256 v) {
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
    return _mm256_srli_epi32(up, 16);
}

// v rounded to a type.
__m256 rounded(__m256 v, int type) {
    if (type == FLOAT32) return v;
    if (type == FLOAT16) return _mm256_cvtph_ps(_mm256_cvtps_ph(v, 0));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bfloat16_bits(v), 16));
}

// Eight numbers from index i on.
__m256 get8(const void* data, int64_t i, int type) {
    if (type == FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(data) + i);
    __m128i halves = load_half(static_cast<const uint16_t*>(data) + i);
    return type == FLOAT16 ? _mm256_cvtph_ps(halves)
                           : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

void put8(void* data, int64_t i, int type, __m256 v) {
    if (type == FLOAT32) return _mm256_storeu_ps(static_cast<float*>(data) + i, v);
    __m128i halves;
    if (type == FLOAT16) {
        halves = _mm256_cvtps_ph(v, 0);
    } else {
        __m256i bits = bfloat16_bits(v);
        halves = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(data) + i), halves);
}

int64_t size(int type) { return type == FLOAT32 ? 4 : 2; }

// The same for the last few of a row: `count` numbers, zeros behind them.
__m256 get8(const void* data, int64_t i, int type, int64_t count) {
    if (count >= 8) return get8(data, i, type);
    uint8_t some[32] = {};
    std::memcpy(some, static_cast<const uint8_t*>(data) + i * size(type), count * size(type));
    return get8(some, 0, type);
}

void put8(void* data, int64_t i, int type, __m256 v, int64_t count) {
    if (count >= 8) return put8(data, i, type, v);
    uint8_t some[32];
    put8(some, 0, type, v);
    std::memcpy(static_cast<uint8_t*>(data) + i * size(type), some, count * size(type));
}

float get(const void* data, int64_t i, int type) {
    if (type == FLOAT32) return static_cast<const float*>(data)[i];
    uint32_t half = static_cast<const uint16_t*>(data)[i];
    return type == FLOAT16 ? _cvtsh_ss(uint16_t(half)) : _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(half << 16))));
}

float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// e^x within two units of fp32's last place: 2^n e^r with |r| <= ln 2 / 2, and seven terms of e^r's series.
__m256 exp8(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87), _mm256_min_ps(_mm256_set1_ps(89), x));  // infinite at 89; a NaN stays one
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // ln 2 in two parts, the first of few bits
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.f / 5040);
    for (float term : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(term));
    __m256i half = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(126)), 23);  // of 2^n
    return _mm256_mul_ps(_mm256_mul_ps(y, _mm256_castsi256_ps(half)), _mm256_set1_ps(2));
}

// f with a type known when compiled.
template <typename F>
void with_type(int type, F f) {
    if (type == FLOAT32) return f(std::integral_constant<int, FLOAT32>());
    if (type == BFLOAT16) return f(std::integral_constant<int, BFLOAT16>());
    f(std::integral_constant<int, FLOAT16>());
}

// ------------------------------------------------------------------------------------------------ products

struct Matrix {
    const uint8_t* codes;
    const void* scale;
    int scale_type;
    const int8_t* zero;  // null: 8 of 4-bit codes, 0 of 8-bit ones
    int64_t rows, columns, group;
    int64_t width, groups;  // bytes of a row, groups of a row

    float scale_at(int64_t row, int64_t k) const { return get(scale, row * groups + group_at(k), scale_type); }
    int zero_at(int64_t row, int64_t k, int middle) const { return zero ? zero[row * groups + group_at(k)] : middle; }
    int64_t group_at(int64_t k) const { return std::min(k / group, groups - 1); }
};

// Up to BLOCK numbers in 16 bits, zeros behind them; returns their scale.
float round_block(const void* x, int64_t first, int type, int64_t count, int16_t* out) {
    alignas(32) float values[BLOCK];
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256i most = _mm256_setzero_si256();
    for (int64_t k = 0; k < BLOCK; k += 8) {
        __m256 v = k < count ? get8(x, first + k, type, count - k) : _mm256_setzero_ps();
        _mm256_store_ps(values + k, v);
        most = _mm256_max_epi32(most, _mm256_castps_si256(_mm256_and_ps(v, magnitude)));  // ordered as bits; NaN is largest
    }
    alignas(32) float each[8];
    _mm256_store_ps(each, _mm256_castsi256_ps(most));
    float largest = 0;
    for (float value : each) largest = value > largest || std::isnan(value) ? value : largest;
    const __m256 inverse = _mm256_set1_ps(largest != 0 ? 32767 / largest : 0);
    for (int64_t k = 0; k < BLOCK; k += 16) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(values + k), inverse));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(values + k + 8), inverse));
        __m256i codes = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), codes);
    }
    return largest / 32767;
}

// One token, ready to be multiplied. Every `span` columns are summed in integers; both halves of the register that holds
// their sums have a scale and a zero of their own, since 4-bit groups can be half as long as what one register reads.
struct Token {
    int64_t span, spans;
    std::vector<int16_t> codes;
    std::vector<float> scale;    // (spans)
    std::vector<int64_t> group;  // (spans, 2): of the weights
    std::vector<int32_t> shift;  // (spans, 8): minus the sums of the codes, lane by lane as the products are summed
};

template <int BITS>
constexpr int64_t READ = BITS == 4 ? 2 * STEP : STEP;  // columns of one step

template <int BITS>
Token round_token(const Matrix& w, const void* x, int type) {
    int64_t blocks = (w.columns + BLOCK - 1) / BLOCK, span = std::max(std::min(w.group, BLOCK), READ<BITS>);
    while (w.columns % span) span /= 2;
    int64_t spans = w.columns / span;
    Token token = {span, spans, std::vector<int16_t>(blocks * BLOCK), std::vector<float>(spans),
                   std::vector<int64_t>(spans * 2), std::vector<int32_t>(spans * 8)};
    std::vector<float> scale(blocks);
    for (int64_t i = 0; i < blocks; i++) {
        int16_t codes[BLOCK], *to = &token.codes[i * BLOCK];
        scale[i] = round_block(x, i * BLOCK, type, std::min(BLOCK, w.columns - i * BLOCK), codes);
        for (int64_t k = 0; k < BLOCK; k += 64)  // four columns share 16 bits of 4-bit codes: first every first, ...
            for (int64_t j = 0; j < 64; j++) to[k + j] = codes[BITS == 4 ? k + j % 16 * 4 + j / 16 : k + j];
    }
    const __m256i by = _mm256_set1_epi16(w.zero ? -1 : BITS == 4 ? -8 : 0);
    for (int64_t s = 0; s < spans; s++) {
        token.scale[s] = scale[s * span / BLOCK];
        token.group[2 * s] = w.group_at(s * span), token.group[2 * s + 1] = w.group_at(s * span + READ<BITS> / 2);
        __m256i sum = _mm256_setzero_si256();
        for (int64_t k = s * span; k < (s + 1) * span; k += 16)
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(load(&token.codes[k]), by));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(&token.shift[s * 8]), sum);
    }
    return token;
}

// One token times one row, STEPS registers of codes to a span. Four-bit codes are not all shifted down: with the second and
// the third of sixteen bits where they are, the products are 16 and 256 times too large, which 32 bits can hold.
template <int BITS, int STEPS>
float multiply_row(const Matrix& w, int64_t row, const Token& token) {
    constexpr bool HALVES = BITS == 4 && STEPS == 1;  // the halves of the register may be of two groups
    const uint8_t* codes = w.codes + row * w.width;
    const int16_t* x = token.codes.data();
    __m256 sum = _mm256_setzero_ps();
    for (int64_t s = 0; s < token.spans; s++, codes += 32 * STEPS, x += READ<BITS> * STEPS) {
        int64_t low = row * w.groups + token.group[2 * s], high = row * w.groups + token.group[2 * s + 1];
        __m256i part = load(&token.shift[s * 8]), more = _mm256_setzero_si256(), most = more;
        if (w.zero) {
            __m128i zero = _mm_set1_epi32(w.zero[low]), other = HALVES ? _mm_set1_epi32(w.zero[high]) : zero;
            part = _mm256_mullo_epi32(part, _mm256_set_m128i(other, zero));
        }
        auto add = [](__m256i& to, __m256i a, const int16_t* b) { to = _mm256_add_epi32(to, _mm256_madd_epi16(a, load(b))); };
#pragma GCC unroll 8
        for (int i = 0; i < STEPS; i++) {
            const uint8_t* from = codes + 32 * i;
            const int16_t* by = x + READ<BITS> * i;
            if (i % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(from + AHEAD), _MM_HINT_T0);
            if constexpr (BITS == 4) {
                __m256i four = load(from);
                add(part, _mm256_and_si256(four, _mm256_set1_epi16(0x000f)), by);
                add(more, _mm256_and_si256(four, _mm256_set1_epi16(0x00f0)), by + 16);
                add(most, _mm256_and_si256(four, _mm256_set1_epi16(0x0f00)), by + 32);
                add(part, _mm256_srli_epi16(four, 12), by + 48);
            } else {
                add(part, _mm256_cvtepi8_epi16(load_half(from)), by);
                add(more, _mm256_cvtepi8_epi16(load_half(from + 16)), by + 16);
            }
        }
        if constexpr (BITS == 4) more = _mm256_add_epi32(_mm256_srai_epi32(more, 4), _mm256_srai_epi32(most, 8));
        __m256 scale = _mm256_set1_ps(get(w.scale, low, w.scale_type));
        if (HALVES) scale = _mm256_insertf128_ps(scale, _mm_set1_ps(get(w.scale, high, w.scale_type)), 1);
        scale = _mm256_mul_ps(scale, _mm256_set1_ps(token.scale[s]));
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(part, more)), scale, sum);
    }
    return total(sum);
}

template <int BITS, int STEPS = 256 / READ<BITS>>
void product_of_one(const Matrix& w, const Token& token, int type, const void* bias, int bias_type, void* out) {
    if constexpr (STEPS > 1)
        if (token.span < STEPS * READ<BITS>) return product_of_one<BITS, STEPS / 2>(w, token, type, bias, bias_type, out);
#pragma omp parallel for if (w.rows * w.columns > SMALL)  // one stretch a thread: what fetches ahead follows it
    for (int64_t first = 0; first < w.rows; first += 8) {
        const Matrix matrix = w;  // in registers
        alignas(32) float y[8] = {};
        int64_t count = std::min<int64_t>(8, w.rows - first);
        for (int64_t i = 0; i < count; i++)
            y[i] = multiply_row<BITS, STEPS>(matrix, first + i, token) + (bias ? get(bias, first + i, bias_type) : 0);
        put8(out, first, type, _mm256_load_ps(y), count);
    }
}

// Sixteen codes of a row less their zero, from column k on; zeros behind the last.
template <int BITS>
__m256i widen_row(const Matrix& w, int64_t row, int64_t k) {
    int64_t left = w.columns - k;
    if (left <= 0 || row >= w.rows) return _mm256_setzero_si256();
    const uint8_t* from = w.codes + row * w.width + k * BITS / 8;
    uint8_t some[16] = {};
    if (left < 16) from = static_cast<uint8_t*>(std::memcpy(some, from, (left * BITS + 7) / 8));
    __m256i codes;
    if (BITS == 4) {
        __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        codes = _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi32(bytes, 12)), _mm256_set1_epi32(0x000f000f));
    } else {
        codes = _mm256_cvtepi8_epi16(load_half(from));
    }
    return _mm256_sub_epi16(codes, _mm256_set1_epi16(int16_t(w.zero_at(row, k, BITS == 4 ? 8 : 0))));
}

void transpose(__m256i v[8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

// `count` columns of a PANEL as (pair of columns, row, 2).
template <int BITS>
void widen_panel(const Matrix& w, int64_t row, int64_t first, int64_t count, int16_t* out) {
    for (int64_t k = 0; k < count; k += 16)
        for (int64_t r = 0; r < PANEL; r += 8) {
            __m256i v[8];
            for (int i = 0; i < 8; i++) v[i] = widen_row<BITS>(w, row + r + i, first + k);
            transpose(v);
            for (int i = 0; i < 8; i++)
                _mm256_store_si256(reinterpret_cast<__m256i*>(out + (k / 2 + i) * PANEL * 2 + r * 2), v[i]);
        }
}

// sum (tokens, PANEL) += the tokens of x (tokens, BLOCK) times a widened PANEL, `count` columns, whose scales are
// (spans, PANEL). T = 0, 1, ... are the tokens: written out, so that all sums are in registers.
template <size_t... T>
void multiply(std::index_sequence<T...>, const int16_t* w, int64_t count, int64_t span, const float* scale, const int16_t* x,
              const float* x_scale, float* sum) {
    for (int64_t first = 0; first < count; first += span, scale += PANEL) {
        __m256i low[] = {(void(T), _mm256_setzero_si256())...}, high[] = {(void(T), _mm256_setzero_si256())...};
        for (int64_t k = first; k < std::min(first + span, count); k += 2) {
            __m256i upper = load(w + k * PANEL), lower = load(w + k * PANEL + 16);
            auto add = [&](int64_t t, __m256i& a, __m256i& b) {
                int32_t pair;
                std::memcpy(&pair, x + t * BLOCK + k, 4);
                __m256i token = _mm256_set1_epi32(pair);
                a = _mm256_add_epi32(a, _mm256_madd_epi16(upper, token));
                b = _mm256_add_epi32(b, _mm256_madd_epi16(lower, token));
                asm("" : "+x"(a), "+x"(b));  // one token after the other, or a compiler makes all products first
            };
            (add(T, low[T], high[T]), ...);
        }
        auto scaled = [&](float* to, __m256i part, const float* by, float token) {
            __m256 both = _mm256_mul_ps(_mm256_load_ps(by), _mm256_set1_ps(token));
            _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), both, _mm256_loadu_ps(to)));
        };
        (scaled(sum + T * PANEL, low[T], scale, x_scale[T]), ...);
        (scaled(sum + T * PANEL + 8, high[T], scale + 8, x_scale[T]), ...);
        asm("" ::: "memory");  // or `sum` takes the registers
    }
}

// The same for 1 to TILE tokens.
template <size_t T = TILE, typename... Rest>
void multiply(int64_t tokens, const Rest&... rest) {
    if constexpr (T > 1)
        if (tokens < int64_t(T)) return multiply<T - 1>(tokens, rest...);
    multiply(std::make_index_sequence<T>(), rest...);
}

template <int BITS>
void product_of_many(const Matrix& w, const void* x, int type, int64_t tokens, const void* bias, int bias_type, void* out) {
    int64_t blocks = (w.columns + BLOCK - 1) / BLOCK, span = std::min(w.group, BLOCK), held = std::min(tokens, CHUNK);
    std::vector<int16_t> x_codes(held * blocks * BLOCK);  // (block, token, BLOCK)
    std::vector<float> x_scale(held * blocks);  // (block, token)
    for (int64_t start = 0; start < tokens; start += CHUNK) {
        int64_t count = std::min(tokens - start, CHUNK);
#pragma omp parallel if (tokens * w.rows * w.columns > SMALL)
        {
#pragma omp for
            for (int64_t i = 0; i < count * blocks; i++) {
                int64_t k = i / count * BLOCK, first = (start + i % count) * w.columns + k;
                x_scale[i] = round_block(x, first, type, std::min(BLOCK, w.columns - k), &x_codes[i * BLOCK]);
            }
            alignas(32) int16_t panel[PANEL * BLOCK];
            alignas(32) float scale[BLOCK / STEP * PANEL], offset[PANEL];
            std::vector<float> sums(count * PANEL);  // (token, PANEL)
#pragma omp for schedule(dynamic) nowait
            for (int64_t row = 0; row < w.rows; row += PANEL) {
                int64_t high = std::min(PANEL, w.rows - row);
                std::fill(sums.begin(), sums.end(), 0.f);
                for (int64_t block = 0; block < blocks; block++) {
                    int64_t first = block * BLOCK, wide = std::min(BLOCK, (w.columns - first + 15) / 16 * 16);
                    widen_panel<BITS>(w, row, first, wide, panel);
                    for (int64_t k = 0; k < wide; k += span)
                        for (int64_t r = 0; r < PANEL; r++)
                            scale[k / span * PANEL + r] = r < high ? w.scale_at(row + r, first + k) : 0;
                    for (int64_t t = 0; t < count; t += TILE)
                        multiply(std::min(TILE, count - t), panel, wide, span, scale, &x_codes[(block * count + t) * BLOCK],
                            &x_scale[block * count + t], &sums[t * PANEL]);
                }
                for (int64_t r = 0; r < PANEL; r++) offset[r] = bias && r < high ? get(bias, row + r, bias_type) : 0;
                for (int64_t t = 0; t < count; t++)
                    for (int64_t r = 0; r < high; r += 8)
                        put8(out, (start + t) * w.rows + row + r, type,
                             _mm256_add_ps(_mm256_loadu_ps(&sums[t * PANEL + r]), _mm256_load_ps(offset + r)), high - r);
            }
        }
    }
}

template <int BITS>
void product(const Matrix& w, const void* x, int type, int64_t tokens, const void* bias, int bias_type, void* out) {
    if (tokens == 1 && w.columns % READ<BITS> == 0)
        product_of_one<BITS>(w, round_token<BITS>(w, x, type), type, bias, bias_type, out);
    else
        product_of_many<BITS>(w, x, type, tokens, bias, bias_type, out);
}

// ------------------------------------------------------------------------------------------------ attention

constexpr int64_t KEYS = 32;     // keys and values in fp32 at a time
constexpr int64_t QUERIES = 16;  // rows of queries that share them, if one kv head has no more

// (rows, KEYS) = queries (rows, dim) keys (KEYS, dim)^T, rows even.
void scores_of(const float* q, const float* k, int64_t rows, int64_t dim, float* scores) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t s = 0; s < KEYS; s += 4) {
            __m256 sum[2][4];
            for (int i = 0; i < 8; i++) sum[i / 4][i % 4] = _mm256_setzero_ps();
            for (int64_t d = 0; d < dim; d += 8) {
                __m256 one = _mm256_loadu_ps(q + r * dim + d), two = _mm256_loadu_ps(q + (r + 1) * dim + d);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    __m256 key = _mm256_loadu_ps(k + (s + i) * dim + d);
                    sum[0][i] = _mm256_fmadd_ps(one, key, sum[0][i]), sum[1][i] = _mm256_fmadd_ps(two, key, sum[1][i]);
                }
            }
            for (int i = 0; i < 2; i++) {
                __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sum[i][0], sum[i][1]), _mm256_hadd_ps(sum[i][2], sum[i][3]));
                __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
                _mm_storeu_ps(scores + (r + i) * KEYS + s, four);
            }
        }
}

// out (rows, dim) += p (rows, KEYS) v (KEYS, dim), V * 8 columns of two rows.
template <int V>
void weigh(const float* p, const float* v, int64_t dim, float* out) {
    __m256 sum[2][V];
    for (int i = 0; i < V; i++) sum[0][i] = _mm256_loadu_ps(out + 8 * i), sum[1][i] = _mm256_loadu_ps(out + dim + 8 * i);
    for (int64_t s = 0; s < KEYS; s++) {
        __m256 one = _mm256_set1_ps(p[s]), two = _mm256_set1_ps(p[KEYS + s]);
#pragma GCC unroll 4
        for (int i = 0; i < V; i++) {
            __m256 value = _mm256_loadu_ps(v + s * dim + 8 * i);
            sum[0][i] = _mm256_fmadd_ps(one, value, sum[0][i]), sum[1][i] = _mm256_fmadd_ps(two, value, sum[1][i]);
        }
    }
    for (int i = 0; i < V; i++) _mm256_storeu_ps(out + 8 * i, sum[0][i]), _mm256_storeu_ps(out + dim + 8 * i, sum[1][i]);
}

struct Heads {
    const void* data;
    int64_t batch, head, token;  // strides, in numbers
};

// Queries t .. t + tokens of the heads that share one kv head, over all keys they see, KEYS at a time with a running maximum
// (Milakov and Gimelshein 2018, arXiv 1805.02867).
template <int TYPE>
void attend(const Heads& q, const Heads& k, const Heads& v, int64_t b, int64_t kv, int64_t shared, int64_t t, int64_t tokens,
            int64_t past, int64_t dim, int64_t heads, int64_t queries, float* memory, void* out) {
    int64_t rows = shared * tokens, even = (rows + 1) / 2 * 2;  // row: (token, head)
    float *query = memory, *sum = query + even * dim, *block = sum + even * dim, *scores = block + KEYS * dim;
    float *most = scores + even * KEYS, *mass = most + even;
    const __m256 root = _mm256_set1_ps(1 / std::sqrt(float(dim)));
    std::fill(query, block, 0.f), std::fill(most, mass, -INFINITY), std::fill(mass, mass + even, 0.f);
    for (int64_t r = 0; r < rows; r++) {
        int64_t from = b * q.batch + (kv * shared + r % shared) * q.head + (t + r / shared) * q.token;
        for (int64_t d = 0; d < dim; d += 8)
            _mm256_storeu_ps(query + r * dim + d, _mm256_mul_ps(get8(q.data, from + d, TYPE), root));
    }
    int64_t end = past + t + tokens;
    auto widen_block = [&](const Heads& x, int64_t first) {
        for (int64_t s = 0; s < KEYS; s++) {
            int64_t from = b * x.batch + kv * x.head + (first + s) * x.token;
            for (int64_t d = 0; d < dim; d += 8)
                _mm256_storeu_ps(block + s * dim + d, first + s < end ? get8(x.data, from + d, TYPE) : _mm256_setzero_ps());
        }
    };
    for (int64_t first = 0; first < end; first += KEYS) {
        widen_block(k, first);
        scores_of(query, block, even, dim, scores);
        for (int64_t r = 0; r < even; r++) {
            float* row = scores + r * KEYS;
            int64_t seen = std::max<int64_t>(std::min(past + t + std::min(r / shared, tokens - 1) + 1 - first, KEYS), 0);
            std::fill(row + seen, row + KEYS, -INFINITY);
            float before = most[r];
            for (int64_t s = 0; s < seen; s++) most[r] = row[s] > most[r] ? row[s] : most[r];
            if (most[r] == -INFINITY) {  // nothing seen yet, or only scores of minus infinity
                std::fill(row, row + KEYS, 0.f);
                continue;
            }
            __m256 top = _mm256_set1_ps(most[r]), part = _mm256_setzero_ps();
            for (int64_t s = 0; s < KEYS; s += 8) {
                __m256 value = _mm256_loadu_ps(row + s), p = exp8(_mm256_sub_ps(value, top));
                p = _mm256_andnot_ps(_mm256_cmp_ps(value, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ), p);
                _mm256_storeu_ps(row + s, p);
                part = _mm256_add_ps(part, p);
            }
            float kept = before == most[r] ? 1 : std::exp(before - most[r]);
            mass[r] = mass[r] * kept + total(part);
            for (int64_t d = 0; kept != 1 && d < dim; d += 8)
                _mm256_storeu_ps(sum + r * dim + d, _mm256_mul_ps(_mm256_loadu_ps(sum + r * dim + d), _mm256_set1_ps(kept)));
        }
        widen_block(v, first);
        for (int64_t r = 0; r < even; r += 2) {
            int64_t d = 0;
            for (; d + 32 <= dim; d += 32) weigh<4>(scores + r * KEYS, block + d, dim, sum + r * dim + d);
            for (; d < dim; d += 8) weigh<1>(scores + r * KEYS, block + d, dim, sum + r * dim + d);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t to = ((b * heads + kv * shared + r % shared) * queries + t + r / shared) * dim;
        for (int64_t d = 0; d < dim; d += 8)
            put8(out, to + d, TYPE, _mm256_div_ps(_mm256_loadu_ps(sum + r * dim + d), _mm256_set1_ps(mass[r])));
    }
}

// ------------------------------------------------------------------------------------------------ rows

// `columns` numbers from x + from on, normed as by `ops.rms_norm`: rounded to the type before the weight, as there.
template <int TYPE>
void norm_row(const void* x, int64_t from, const void* weight, float eps, int64_t columns, void* out, int64_t to) {
    __m256d low = _mm256_setzero_pd(), high = low;  // so that the scale is rounded once, whatever the order of the sum
    for (int64_t k = 0; k < columns; k += 8) {
        __m256 v = get8(x, from + k, TYPE, columns - k);
        __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), b = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
        low = _mm256_fmadd_pd(a, a, low), high = _mm256_fmadd_pd(b, b, high);
    }
    alignas(32) double sums[4];
    _mm256_store_pd(sums, _mm256_add_pd(low, high));
    double mean = (sums[0] + sums[1] + sums[2] + sums[3]) / double(columns);
    __m256 scale = _mm256_set1_ps(float(1 / std::sqrt(mean + eps)));
    for (int64_t k = 0; k < columns; k += 8) {
        __m256 v = rounded(_mm256_mul_ps(get8(x, from + k, TYPE, columns - k), scale), TYPE);
        put8(out, to + k, TYPE, _mm256_mul_ps(v, get8(weight, k, TYPE, columns - k)), columns - k);
    }
}

// One head as `ops.rope` turns it, every product rounded; its row of the tables begins at `table`.
template <int TYPE>
void rotate_row(const void* x, int64_t from, const void* cos, const void* sin, int64_t table, int64_t dim, void* out, int64_t to) {
    int64_t half = dim / 2;
    for (int64_t k = 0; k < half; k += 8) {
        int64_t count = half - k, other = k + half;
        __m256 a = get8(x, from + k, TYPE, count), c = get8(x, from + other, TYPE, count);
        auto times = [&](__m256 v, const void* by, int64_t at) {
            return rounded(_mm256_mul_ps(v, get8(by, table + at, TYPE, count)), TYPE);
        };
        put8(out, to + k, TYPE, _mm256_sub_ps(times(a, cos, k), times(c, sin, k)), count);
        put8(out, to + other, TYPE, _mm256_add_ps(times(c, cos, other), times(a, sin, other)), count);
    }
}

}  // namespace

extern "C" void linear(const uint8_t* codes, const void* scale, int scale_type, const int8_t* zero, int64_t rows,
                       int64_t columns, int64_t group, int bits, const void* x, int type, int64_t tokens, const void* bias,
                       int bias_type, void* out) {
    Matrix w = {codes, scale, scale_type, zero, rows, columns, group, (columns * bits + 7) / 8, (columns + group - 1) / group};
    if (bits == 4)
        product<4>(w, x, type, tokens, bias, bias_type, out);
    else
        product<8>(w, x, type, tokens, bias, bias_type, out);
}

// `ops.attention` without a mask: q (batch, heads, queries, dim), k and v (batch, kv_heads, keys, dim), last axes contiguous,
// dim a multiple of eight. Everything is fp32 until the result is rounded.
extern "C" void attention(const void* q, const void* k, const void* v, int type, int64_t batch, int64_t heads,
                          int64_t kv_heads, int64_t queries, int64_t keys, int64_t dim, int64_t q0, int64_t q1, int64_t q2,
                          int64_t k0, int64_t k1, int64_t k2, int64_t v0, int64_t v1, int64_t v2, void* out) {
    Heads qh = {q, q0, q1, q2}, kh = {k, k0, k1, k2}, vh = {v, v0, v1, v2};
    int64_t shared = heads / kv_heads, tokens = std::min(queries, std::max<int64_t>(QUERIES / shared, 1));
    int64_t tiles = (queries + tokens - 1) / tokens, rows = shared * tokens + 1;
    with_type(type, [&](auto known) {
#pragma omp parallel if (batch * heads * queries * keys * dim > SMALL)
        {
            std::vector<float> memory(rows * (2 * dim + KEYS + 2) + KEYS * dim);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < batch * kv_heads * tiles; i++) {
                int64_t t = (tiles - 1 - i % tiles) * tokens;  // the longest first
                attend<decltype(known)::value>(qh, kh, vh, i / tiles / kv_heads, i / tiles % kv_heads, shared, t,
                    std::min(tokens, queries - t), keys - queries, dim, heads, queries, memory.data(), out);
            }
        }
    });
}

// `ops.rms_norm` over rows of x: rounded to x's type before the weight, as there.
extern "C" void rms_norm(const void* x, const void* weight, int type, float eps, int64_t rows, int64_t columns, void* out) {
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
#pragma omp parallel for if (rows * columns > SMALL)
        for (int64_t row = 0; row < rows; row++) norm_row<TYPE>(x, row * columns, weight, eps, columns, out, row * columns);
    });
}

// `ops.add_rms_norm`: the sum is rounded to its type before it is normed.
extern "C" void add_rms_norm(const void* x, const void* residual, const void* weight, int type, float eps, int64_t rows,
                             int64_t columns, void* total, void* out) {
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
#pragma omp parallel for if (rows * columns > SMALL)
        for (int64_t row = 0; row < rows; row++) {
            int64_t first = row * columns;
            for (int64_t k = 0; k < columns; k += 8) {
                __m256 a = get8(x, first + k, TYPE, columns - k), b = get8(residual, first + k, TYPE, columns - k);
                put8(total, first + k, TYPE, _mm256_add_ps(a, b), columns - k);
            }
            norm_row<TYPE>(total, first, weight, eps, columns, out, first);
        }
    });
}

// `ops.rope` of x (batch, heads, tokens, dim), of which only the last axis need be contiguous.
extern "C" void rope(const void* x, const void* cos, const void* sin, int type, int64_t batch, int64_t heads, int64_t tokens,
                     int64_t dim, int64_t x0, int64_t x1, int64_t x2, int64_t table0, void* out) {
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
#pragma omp parallel for if (batch * heads * tokens * dim > SMALL)
        for (int64_t i = 0; i < batch * heads * tokens; i++) {
            int64_t b = i / tokens / heads, t = i % tokens, from = b * x0 + i / tokens % heads * x1 + t * x2;
            rotate_row<TYPE>(x, from, cos, sin, b * table0 + t * dim, dim, out, i * dim);
        }
    });
}

// `ops.norm_rope_write` of q (tokens, heads, dim), k and v (tokens, kv_heads, dim), last axes contiguous, weights perhaps
// null, tables (tokens, dim), into caches of `pages` x kv_heads x `page` x dim. 1 if a slot lies outside: nothing is done then.
extern "C" int norm_rope_write(const void* q, const void* k, const void* v, const void* q_weight, const void* k_weight,
                               int type, float eps, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t q0,
                               int64_t q1, int64_t k0, int64_t k1, int64_t v0, int64_t v1, const void* cos, const void* sin,
                               const int64_t* slots, int64_t pages, int64_t page, int64_t kc0, int64_t kc1, int64_t kc2,
                               int64_t vc0, int64_t vc1, int64_t vc2, void* k_cache, void* v_cache, void* out) {
    for (int64_t t = 0; t < tokens; t++)
        if (slots[t] >= pages * page) return 1;
    int64_t all = heads + 2 * kv_heads;
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        auto turned = [&](const void* x, int64_t from, const void* weight, int64_t t, void* to, int64_t at) {
            uint8_t normed[MOST * 4];
            if (!weight) return rotate_row<TYPE>(x, from, cos, sin, t * dim, dim, to, at);
            norm_row<TYPE>(x, from, weight, eps, dim, normed, 0);
            rotate_row<TYPE>(normed, 0, cos, sin, t * dim, dim, to, at);
        };
#pragma omp parallel for if (tokens * all * dim > SMALL)
        for (int64_t i = 0; i < tokens * all; i++) {
            int64_t t = i / all, head = i % all, slot = slots[t];
            if (head < heads) {
                turned(q, t * q0 + head * q1, q_weight, t, out, (t * heads + head) * dim);
                continue;
            }
            if (slot < 0) continue;
            int64_t kv = (head - heads) % kv_heads, row = slot / page, entry = slot % page;
            if (head < heads + kv_heads) {
                turned(k, t * k0 + kv * k1, k_weight, t, k_cache, row * kc0 + kv * kc1 + entry * kc2);
            } else {
                auto from = static_cast<const uint8_t*>(v) + (t * v0 + kv * v1) * size(TYPE);
                auto to = static_cast<uint8_t*>(v_cache) + (row * vc0 + kv * vc1 + entry * vc2) * size(TYPE);
                std::memcpy(to, from, dim * size(TYPE));
            }
        }
    });
    return 0;
}

// `ops.swiglu` of rows with gaps between them: silu(gate) is rounded before it is multiplied.
extern "C" void swiglu(const void* gate, const void* up, int type, int64_t rows, int64_t columns, int64_t gate0, int64_t up0,
                       void* out) {
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        int64_t parts = (columns + SMALL - 1) / SMALL;
#pragma omp parallel for if (rows * columns > SMALL)
        for (int64_t i = 0; i < rows * parts; i++) {
            int64_t row = i / parts, first = i % parts * SMALL, last = std::min(columns, first + SMALL);
            for (int64_t k = first; k < last; k += 8) {
                __m256 g = get8(gate, row * gate0 + k, TYPE, last - k), one = _mm256_set1_ps(1);
                __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exp8(_mm256_sub_ps(_mm256_setzero_ps(), g))));
                __m256 y = _mm256_mul_ps(rounded(silu, TYPE), get8(up, row * up0 + k, TYPE, last - k));
                put8(out, row * columns + k, TYPE, y, last - k);
            }
        }
    });
}
