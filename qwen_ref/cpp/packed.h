// y = x W^T + bias with a matrix of 4- or 8-bit codes, multiplied as integers.
//
// The codes are taken as they are; x is rounded to 16 bits under one scale for every BLOCK columns of a token, which is finer
// than bfloat16. One instruction then multiplies 16 columns (AVX-512: 32) and adds them in pairs: twice the speed of fp32. With up
// to FEW tokens the codes are widened to 16 bits in a register, with one at the speed of memory; with many, PANEL rows at a time
// are widened to the first-level cache, once for all tokens, and laid so that a register holds one pair of columns of eight
// or sixteen rows: their sums never have to be added across a register.
#pragma once

#include "numbers.h"

namespace {

constexpr int64_t BLOCK = 256;  // columns under one scale of x; their largest sum, 256 * 255 * 32767, fits 32 bits
constexpr int64_t STEP = 32;    // the smallest group; others are whole multiples of it
constexpr int64_t PANEL = 2 * Integers::N;  // rows that one thread takes at a time
constexpr int64_t TILE = Integers::N == 16 ? 8 : 6;  // tokens multiplied with them at once: 2 * TILE sums in registers
constexpr int64_t CHUNK = 512;  // tokens rounded together
constexpr int64_t TOKENS = 4;   // multiplied with a row at once, while it is read: so many sums in registers

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

Matrix matrix(const uint8_t* codes, const void* scale, int scale_type, const int8_t* zero, int64_t rows, int64_t columns,
              int64_t group, int bits) {
    return {codes, scale, scale_type, zero, rows, columns, group, (columns * bits + 7) / 8, (columns + group - 1) / group};
}

// f with the width of codes known when compiled.
template <typename F>
void with_bits(int bits, F f) {
    if (bits == 4) return f(std::integral_constant<int, 4>());
    f(std::integral_constant<int, 8>());
}

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

// Sixty-four codes, of which four share 16 bits of 4-bit codes: every first of four, then every second, third and fourth.
void deal(int16_t* codes) {
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    __m256i v[4], four[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_shuffle_epi8(load(codes + 16 * i), pairs);  // word j of a half: two j-th
    for (int i = 0; i < 2; i++) {
        __m256i low = i ? _mm256_unpackhi_epi32(v[0], v[1]) : _mm256_unpacklo_epi32(v[0], v[1]);
        __m256i high = i ? _mm256_unpackhi_epi32(v[2], v[3]) : _mm256_unpacklo_epi32(v[2], v[3]);
        four[2 * i] = _mm256_unpacklo_epi64(low, high), four[2 * i + 1] = _mm256_unpackhi_epi64(low, high);
    }
    for (int i = 0; i < 4; i++)
        store(codes + 16 * i, _mm256_permutevar8x32_epi32(four[i], _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

// Two times sixty-four that `deal` has dealt: what a register of 64 bytes multiplies at once comes together.
void join(int16_t* codes) {
    __m256i v[8];
    for (int i = 0; i < 8; i++) v[i] = load(codes + 16 * i);
    for (int i = 0; i < 4; i++) store(codes + 32 * i, v[i]), store(codes + 32 * i + 16, v[i + 4]);
}

template <int BITS>
constexpr int64_t READ = BITS == 4 ? 2 * STEP : STEP;  // columns of one step

// One token, ready to be multiplied. Every `span` columns are summed in integers, and lie together: their codes; minus the sums of
// these, times the zero if it is the same everywhere, lane by lane as the products are summed; and their scale. Both halves of
// the register that holds the sums have a scale and a zero of their own, since 4-bit groups can be half as long as what one
// register reads.
struct Token {
    int64_t span, spans;
    Aligned<uint8_t> parts;      // (spans, bytes(span))
    std::vector<int64_t> group;  // (spans, 2): of the weights

    static constexpr int64_t SCALE = 32;  // bytes after the codes: eight sums are before it
    static constexpr int64_t bytes(int64_t span) { return 2 * span + 64; }
};

template <int BITS>
Token round_token(const Matrix& w, const void* x, int type) {
    int64_t span = std::max(std::min(w.group, BLOCK), READ<BITS>);
    while (w.columns % span) span /= 2;
    int64_t spans = w.columns / span;
    Token token = {span, spans, Aligned<uint8_t>(spans * Token::bytes(span)), std::vector<int64_t>(spans * 2)};
    const __m256i by = _mm256_set1_epi16(w.zero ? -1 : BITS == 4 ? -8 : 0);
    alignas(64) int16_t codes[BLOCK];
    float scale = 0;
    for (int64_t s = 0; s < spans; s++) {
        int64_t first = s * span, k = first % BLOCK;
        if (!k) {
            scale = round_block(x, first, type, std::min(BLOCK, w.columns - first), codes);
            for (int64_t i = 0; BITS == 4 && i < BLOCK; i += 64) deal(codes + i);
            for (int64_t i = 0; BITS == 4 && Integers::N == 16 && span % 128 == 0 && i < BLOCK; i += 128) join(codes + i);
        }
        __m256i sum = _mm256_setzero_si256();
        for (int64_t i = k; i < k + span; i += 16) sum = add_products(sum, load(codes + i), by);
        uint8_t* part = &token.parts[s * Token::bytes(span)];
        std::memcpy(part, codes + k, 2 * span), store(part + 2 * span, sum);
        std::memcpy(part + 2 * span + Token::SCALE, &scale, sizeof scale);
        token.group[2 * s] = w.group_at(first), token.group[2 * s + 1] = w.group_at(first + READ<BITS> / 2);
    }
    return token;
}

// T tokens times one row, STEPS times 32 bytes of codes to a span.
template <int BITS, int STEPS, int T>
void multiply_row(const Matrix& w, int64_t row, const Token* token, float* y) {
    using Register = std::conditional_t<BITS == 8 || STEPS % 2 == 0, Integers, Eight>;
    constexpr int64_t BYTES = sizeof(Register) / (BITS == 4 ? 1 : 2);  // of codes, multiplied at once
    constexpr int64_t SPAN = STEPS * READ<BITS>, SUMS = 2 * SPAN;  // where in a part of x its sums are, in bytes
    constexpr bool HALVES = BITS == 4 && STEPS == 1;  // the halves of the register may be of two groups
    const uint8_t *codes = w.codes + row * w.width, *x[T];
    __m256 sum[T];
    for (int t = 0; t < T; t++) x[t] = token[t].parts.get(), sum[t] = _mm256_setzero_ps();
    for (int64_t s = 0; s < token->spans; s++, codes += 32 * STEPS) {
        int64_t low = row * w.groups + token->group[2 * s], high = row * w.groups + token->group[2 * s + 1];
        Register part[T], more[T];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 32 * STEPS; i += BYTES) {
            if (i % 64 == 0) _mm_prefetch(reinterpret_cast<const char*>(codes + i + AHEAD), _MM_HINT_T1);
            auto add = [&](Register* to, Register c, int64_t at) {
                for (int t = 0; t < T; t++) to[t].add_products(c, Register::at(x[t] + at));
            };
            if constexpr (BITS == 4) {
                Register four = Register::at(codes + i);
                add(part, four.template nibble<0>(), 4 * i), add(more, four.template nibble<1>(), 4 * i + BYTES);
                add(part, four.template nibble<2>(), 4 * i + 2 * BYTES), add(more, four.template nibble<3>(), 4 * i + 3 * BYTES);
            } else {
                add(i / BYTES % 2 ? more : part, Register::widened(codes + i), 2 * i);
            }
        }
        __m256 scale = _mm256_set1_ps(get(w.scale, low, w.scale_type));
        if (HALVES) scale = _mm256_insertf128_ps(scale, _mm_set1_ps(get(w.scale, high, w.scale_type)), 1);
        __m256i zero = _mm256_set1_epi32(w.zero ? w.zero[low] : 1);
        if (HALVES && w.zero) zero = _mm256_inserti128_si256(zero, _mm_set1_epi32(w.zero[high]), 1);
        for (int t = 0; t < T; t++) {
            __m256i shift = load(x[t] + SUMS);
            __m256 by = _mm256_mul_ps(scale, _mm256_broadcast_ss(reinterpret_cast<const float*>(x[t] + SUMS + Token::SCALE)));
            if (w.zero) shift = _mm256_mullo_epi32(shift, zero);
            sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32((part[t] + more[t]).eight(), shift)), by, sum[t]);
            x[t] += Token::bytes(SPAN);
        }
    }
    for (int t = 0; t < T; t++) y[t] = total(sum[t]);
}

// One token times one row, for the token's own span. Compiled once, however many use it: the row is much longer than the call.
template <int BITS, int STEPS = 256 / READ<BITS>>
__attribute__((noinline)) float multiply_row_of(const Matrix& w, int64_t row, const Token& token) {
    if constexpr (STEPS > 1)
        if (token.span < STEPS * READ<BITS>) return multiply_row_of<BITS, STEPS / 2>(w, row, token);
    float y;
    multiply_row<BITS, STEPS, 1>(w, row, &token, &y);
    return y;
}

// Eight rows from `row` on, or `count`, times `all` tokens or the first TOKENS, each as if it were alone, to (token, row).
template <int BITS, int STEPS, int64_t T = TOKENS>
void multiply_rows(const Matrix& w, int64_t row, int64_t count, const Token* tokens, int64_t all, int type, const void* bias,
                   int bias_type, void* out, int64_t to) {
    if constexpr (T > 1)
        if (all < T) return multiply_rows<BITS, STEPS, T - 1>(w, row, count, tokens, all, type, bias, bias_type, out, to);
    alignas(32) float y[T][8] = {};
    for (int64_t i = 0; i < count; i++) {
        float each[T], offset = bias ? get(bias, row + i, bias_type) : 0;
        multiply_row<BITS, STEPS, T>(w, row + i, tokens, each);
        for (int j = 0; j < T; j++) y[j][i] = each[j] + offset;
    }
    for (int j = 0; j < T; j++) put8(out, to + j * w.rows + row, type, _mm256_load_ps(y[j]), count);
}

// Up to FEW tokens, TOKENS at once: codes come from memory for the first of them.
template <int BITS, int STEPS = 256 / READ<BITS>>
void product_of_few(const Matrix& w, const Token* tokens, int64_t all, int type, const void* bias, int bias_type, void* out) {
    if constexpr (STEPS > 1)
        if (tokens->span < STEPS * READ<BITS>)
            return product_of_few<BITS, STEPS / 2>(w, tokens, all, type, bias, bias_type, out);
    share((w.rows + 7) / 8, w.rows * w.columns, [&](int64_t block, int64_t last) {
        const Matrix matrix = w;  // in registers
        for (; block < last; block++) {
            int64_t row = block * 8, count = std::min<int64_t>(8, w.rows - row);
            for (int64_t t = 0; t < all; t += TOKENS)
                multiply_rows<BITS, STEPS>(matrix, row, count, tokens + t, all - t, type, bias, bias_type, out, t * w.rows);
        }
    });
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

// `count` columns of a PANEL as (pair of columns, row, 2).
template <int BITS>
void widen_panel(const Matrix& w, int64_t row, int64_t first, int64_t count, int16_t* out) {
    for (int64_t k = 0; k < count; k += 16)
        for (int64_t r = 0; r < PANEL; r += 8) {
            __m256i v[8];
            for (int i = 0; i < 8; i++) v[i] = widen_row<BITS>(w, row + r + i, first + k);
            transpose_words(v);
            for (int i = 0; i < 8; i++)
                _mm256_store_si256(reinterpret_cast<__m256i*>(out + (k / 2 + i) * PANEL * 2 + r * 2), v[i]);
        }
}

// to[i] += half i of a panel's sums, scaled.
void add_scaled(float* to, Integers low, Integers high, const float* scale, float by) {
    auto add = [&](int64_t r, Integers sums) {
        Floats all = Floats::at(to + r);
        all.add_product(floats(sums), Floats::at(scale + r) * Floats::of(by));
        all.put(to + r);
    };
    add(0, low), add(Floats::N, high);
}

// sum (tokens, PANEL) += the tokens of x (tokens, BLOCK) times a widened PANEL, `count` columns, whose scales are
// (spans, PANEL). T = 0, 1, ... are the tokens: written out, so that all sums are in registers, two to a token: what multiplies
// both is fetched once.
template <size_t... T>
void multiply(std::index_sequence<T...>, const int16_t* w, int64_t count, int64_t span, const float* scale, const int16_t* x,
              const float* x_scale, float* sum) {
    for (int64_t first = 0; first < count; first += span, scale += PANEL) {
        Integers low[] = {(void(T), Integers())...}, high[] = {(void(T), Integers())...};
        for (int64_t k = first; k < std::min(first + span, count); k += 2) {
            Integers upper = Integers::at(w + k * PANEL), lower = Integers::at(w + k * PANEL + PANEL);  // rows' pairs of columns
            auto add = [&](int64_t t, Integers& a, Integers& b) {
                int32_t pair;
                std::memcpy(&pair, x + t * BLOCK + k, sizeof pair);
                Integers token = Integers::of(pair);
                a.add_products(upper, token), b.add_products(lower, token);
                // One token after the other, each sum where it is: or a compiler makes all products first, or moves sums about.
                asm("" : "+v"(a.all), "+v"(b.all));
            };
            (add(T, low[T], high[T]), ...);
        }
        (add_scaled(sum + T * PANEL, low[T], high[T], scale, x_scale[T]), ...);
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
        share(count * blocks, count * w.columns, [&](int64_t i, int64_t last) {
            for (; i < last; i++) {
                int64_t k = i / count * BLOCK, first = (start + i % count) * w.columns + k;
                x_scale[i] = round_block(x, first, type, std::min(BLOCK, w.columns - k), &x_codes[i * BLOCK]);
            }
        });
        share((w.rows + PANEL - 1) / PANEL, count * w.rows * w.columns, [&](int64_t i, int64_t last) {
            alignas(64) int16_t panel[PANEL * BLOCK];
            alignas(64) float scale[BLOCK / STEP * PANEL], offset[PANEL];
            Aligned<float> sums(count * PANEL);  // (token, PANEL)
            for (; i < last; i++) {
                int64_t row = i * PANEL, high = std::min(PANEL, w.rows - row);
                std::fill(sums.get(), sums.get() + count * PANEL, 0.f);
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
        }, MANY_PARTS);
    }
}

template <int BITS>
void product(const Matrix& w, const void* x, int type, int64_t tokens, const void* bias, int bias_type, void* out) {
    if (tokens < 1 || tokens > FEW || w.columns % READ<BITS>)
        return product_of_many<BITS>(w, x, type, tokens, bias, bias_type, out);
    std::vector<Token> few;
    for (int64_t t = 0; t < tokens; t++)
        few.push_back(round_token<BITS>(w, static_cast<const uint8_t*>(x) + t * w.columns * size(type), type));
    product_of_few<BITS>(w, few.data(), tokens, type, bias, bias_type, out);
}

// `linear_int4` and `linear_int8` of `quant/packed.py`.
void linear_packed(const uint8_t* codes, const void* scale, int scale_type, const int8_t* zero, int64_t group, int bits,
                   int64_t rows, int64_t columns, const void* x, int type, int64_t tokens, const void* bias, int bias_type,
                   void* out) {
    Matrix w = matrix(codes, scale, scale_type, zero, rows, columns, group, bits);
    with_bits(bits, [&](auto known) { product<decltype(known)::value>(w, x, type, tokens, bias, bias_type, out); });
}

}  // namespace
