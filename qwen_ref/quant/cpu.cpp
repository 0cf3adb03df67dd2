// y = x W^T + bias for matrices of 4- and 8-bit codes on a CPU with AVX2, multiplied as integers.
//
// The codes are taken as they are; x is rounded to 16 bits under one scale for every BLOCK columns of a token, which is
// finer than bfloat16. One instruction then multiplies sixteen columns and adds them in pairs: twice the speed of fp32.
// With one token the codes are widened to 16 bits in a register, at the speed of memory; with many, a few rows at a time
// are widened to the first-level cache, once for all tokens.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 256;  // columns under one scale of x; their largest sum, 256 * 255 * 32767, fits 32 bits
constexpr int64_t STEP = 32;    // columns read at once; groups are whole multiples of it
constexpr int64_t PANEL = 8;    // rows that one thread takes at a time
constexpr int64_t CHUNK = 256;  // tokens rounded together
constexpr int64_t AHEAD = 2048; // bytes of codes asked for before they are read

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

float get(const void* data, int64_t i, int type) {
    if (type == FLOAT32) return static_cast<const float*>(data)[i];
    uint16_t half = static_cast<const uint16_t*>(data)[i];
    if (type == FLOAT16) return _cvtsh_ss(half);
    uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void put(void* data, int64_t i, int type, float value) {
    if (type == FLOAT32) {
        static_cast<float*>(data)[i] = value;
    } else if (type == FLOAT16) {
        static_cast<uint16_t*>(data)[i] = _cvtss_sh(value, 0);
    } else {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits = std::isnan(value) ? 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
        static_cast<uint16_t*>(data)[i] = uint16_t(bits >> 16);
    }
}

__m256i load(const void* data) { return _mm256_loadu_si256(static_cast<const __m256i*>(data)); }

// STEP codes as 16-bit numbers less their zero. Of 4-bit codes, `a` gets the even columns and `b` the odd ones.
template <int BITS>
void widen(const uint8_t* codes, __m256i zero, __m256i& a, __m256i& b) {
    if (BITS == 16) {  // wide already
        a = load(codes), b = load(codes + 32);
        return;
    }
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    if (BITS == 4) {
        __m256i pairs = _mm256_cvtepu8_epi16(bytes);
        a = _mm256_and_si256(pairs, _mm256_set1_epi16(15)), b = _mm256_srli_epi16(pairs, 4);
    } else {
        a = _mm256_cvtepi8_epi16(bytes);
        b = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16)));
    }
    a = _mm256_sub_epi16(a, zero), b = _mm256_sub_epi16(b, zero);
}

template <int BITS>
void widen_row(const uint8_t* codes, int64_t columns, const int16_t* zeros, int64_t span, int16_t* out) {
    __m256i zero = _mm256_setzero_si256(), a, b;
    for (int64_t k = 0, next = 0; k < columns; k += STEP) {
        if (k == next) zero = _mm256_set1_epi16(*zeros++), next += span;
        uint8_t tail[STEP] = {};  // so that nothing behind the row is read
        const uint8_t* from = codes + k * BITS / 8;
        if (columns - k < STEP) from = static_cast<uint8_t*>(std::memcpy(tail, from, ((columns - k) * BITS + 7) / 8));
        widen<BITS>(from, zero, a, b);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + k), a);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + k + 16), b);
    }
}

// `count` numbers in 16 bits, in the order of `widen`. Returns their scale.
float round(const void* x, int64_t first, int type, int64_t count, int bits, int16_t* out) {
    float values[BLOCK] = {};
    int32_t word, most = 0;
    for (int64_t k = 0; k < count; k++) values[k] = get(x, first + k, type);
    for (int64_t k = 0; k < BLOCK; k++) {
        std::memcpy(&word, &values[k], 4);
        most = std::max(most, word & 0x7fffffff);  // magnitudes order as their bits do; a NaN is the largest
    }
    float largest;
    std::memcpy(&largest, &most, 4);
    float inverse = most ? 32767 / largest : 0;
    int16_t codes[BLOCK];
    for (int64_t k = 0; k < BLOCK; k++) {
        float shifted = values[k] * inverse + 12582912.f;  // 1.5 * 2^23: the nearest integer is in the lowest bits
        std::memcpy(&word, &shifted, 4);
        codes[k] = int16_t(word);
    }
    for (int64_t k = 0; k < BLOCK; k += STEP)
        for (int64_t i = 0; i < STEP; i++) out[k + i] = codes[bits == 4 ? k + i % 16 * 2 + i / 16 : k + i];
    return largest / 32767;
}

// R rows times T tokens into out (R, CHUNK). Every `span` columns of a row have one scale and one zero.
template <int BITS, int R, int T>
void multiply(const uint8_t* w, int64_t width, const float* scale, const int16_t* zero, int64_t spans, int64_t span,
              const int16_t* x, int64_t stride, const float* x_scale, float* out) {
    alignas(32) float sum[R][T][8];
    for (int i = 0; i < R * T; i++) _mm256_store_ps(sum[i / T][i % T], _mm256_setzero_ps());
    for (int64_t s = 0; s < spans; s++) {
        __m256i part[R][T], zeros[R];
        for (int r = 0; r < R; r++) zeros[r] = _mm256_set1_epi16(zero[r * spans + s]);
        for (int i = 0; i < R * T; i++) part[i / T][i % T] = _mm256_setzero_si256();
        for (int64_t k = s * span; k < (s + 1) * span; k += STEP) {
            __m256i row[R][2];
            for (int r = 0; r < R; r++) {
                const uint8_t* from = w + r * width + k * BITS / 8;
                if (BITS < 16) _mm_prefetch(reinterpret_cast<const char*>(from + AHEAD), _MM_HINT_T0);
                widen<BITS>(from, zeros[r], row[r][0], row[r][1]);
            }
            for (int half = 0; half < 2; half++)
                for (int t = 0; t < T; t++) {
                    __m256i token = load(x + t * stride + k + 16 * half);
                    for (int r = 0; r < R; r++) part[r][t] = _mm256_add_epi32(part[r][t], _mm256_madd_epi16(row[r][half],
                        token));
                }
        }
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) {
                __m256 both = _mm256_set1_ps(scale[r * spans + s] * x_scale[s * span / BLOCK * CHUNK + t]);
                __m256 total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[r][t]), both, _mm256_load_ps(sum[r][t]));
                _mm256_store_ps(sum[r][t], total);
            }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            __m128 v = _mm_add_ps(_mm_load_ps(sum[r][t]), _mm_load_ps(sum[r][t] + 4));
            v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            out[r * CHUNK + t] = _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
        }
}

template <int BITS>
void product(const uint8_t* codes, const void* scale, int scale_type, const int8_t* zero, int64_t rows, int64_t columns,
             int64_t group, const void* x, int type, int64_t tokens, const void* bias, int bias_type, void* out) {
    int64_t blocks = (columns + BLOCK - 1) / BLOCK, stride = blocks * BLOCK, width = (columns * BITS + 7) / 8;
    int64_t span = std::min(group, BLOCK), spans = stride / span, groups = (columns + group - 1) / group;
    bool direct = tokens == 1 && columns % span == 0;
    std::vector<int64_t> group_of(spans);
    for (int64_t s = 0; s < spans; s++) group_of[s] = std::min(s * span / group, groups - 1);
    std::vector<int16_t> x_codes(std::min(tokens, CHUNK) * stride);
    std::vector<float> x_scale(CHUNK * blocks);
    for (int64_t start = 0; start < tokens; start += CHUNK) {
        int64_t count = std::min(tokens - start, CHUNK);
#pragma omp parallel for if (count > 8)
        for (int64_t i = 0; i < count * blocks; i++) {
            int64_t t = i / blocks, k = i % blocks * BLOCK;
            x_scale[k / BLOCK * CHUNK + t] = round(x, (start + t) * columns + k, type, std::min(BLOCK, columns - k),
                BITS, &x_codes[i * BLOCK]);
        }
#pragma omp parallel
        {
            std::vector<int16_t> memory(direct ? 0 : PANEL * stride + 16), zeros(PANEL * spans);
            std::vector<float> scales(PANEL * spans), sums(PANEL * CHUNK);
            int16_t* wide = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 31) / 2;
#pragma omp for schedule(dynamic, 4) nowait
            for (int64_t first = 0; first < rows; first += PANEL) {
                int64_t last = std::min(first + PANEL, rows);
                for (int64_t row = first, i = 0; row < last; row++)
                    for (int64_t s = 0; s < spans; s++, i++) {
                        int64_t g = row * groups + group_of[s];
                        scales[i] = get(scale, g, scale_type), zeros[i] = zero ? zero[g] : BITS == 4 ? 8 : 0;
                    }
                if (direct) {
                    for (int64_t r = 0; r < last - first; r++)
                        multiply<BITS, 1, 1>(codes + (first + r) * width, width, &scales[r * spans], &zeros[r * spans],
                            spans, span, x_codes.data(), stride, x_scale.data(), &sums[r * CHUNK]);
                } else {
                    for (int64_t row = first; row < last; row++)
                        widen_row<BITS>(codes + row * width, columns, &zeros[(row - first) * spans], span,
                            wide + (row - first) * stride);
                    for (int64_t t = 0; t < count;) {
                        bool four = t + 4 <= count;
                        for (int64_t r = 0; r < PANEL; r += 2)
                            (four ? multiply<16, 2, 4> : multiply<16, 2,
                                1>)(reinterpret_cast<uint8_t*>(wide + r * stride), stride * 2, &scales[r * spans],
                                &zeros[r * spans], spans, span, &x_codes[t * stride], stride, &x_scale[t],
                                &sums[r * CHUNK + t]);
                        t += four ? 4 : 1;
                    }
                }
                for (int64_t t = 0; t < count; t++)
                    for (int64_t row = first; row < last; row++)
                        put(out, (start + t) * rows + row, type, sums[(row - first) * CHUNK + t] + (bias ? get(bias, row,
                            bias_type) : 0));
            }
        }
    }
}

}  // namespace

extern "C" void linear(const uint8_t* codes, const void* scale, int scale_type, const int8_t* zero, int64_t rows,
    int64_t columns,
                       int64_t group, int bits, const void* x, int type, int64_t tokens, const void* bias, int bias_type,
                           void* out) {
    (bits == 4 ? product<4> : product<8>)(codes, scale, scale_type, zero, rows, columns, group, x, type, tokens, bias,
        bias_type, out);
}

// `ops.rms_norm` over rows of x: rounded to x's type before the weight, as there.
extern "C" void rms_norm(const void* x, const void* weight, int type, float eps, int64_t rows, int64_t columns, void* out) {
    for (int64_t row = 0; row < rows; row++) {
        double squares[8] = {};  // so that the scale is rounded once, whatever the order of the sum
        for (int64_t k = 0; k < columns; k++) {
            float value = get(x, row * columns + k, type);
            squares[k % 8] += double(value) * value;
        }
        double total = 0;
        for (double square : squares) total += square;
        float scale = float(1 / std::sqrt(total / double(columns) + eps));
        for (int64_t k = 0; k < columns; k++) {
            put(out, row * columns + k, type, get(x, row * columns + k, type) * scale);
            put(out, row * columns + k, type, get(out, row * columns + k, type) * get(weight, k, type));
        }
    }
}

// `ops.rope` of x (batch, heads, tokens, dim), of which only the last axis need be contiguous; every product is rounded.
extern "C" void rope(const void* x, const void* cos, const void* sin, int type, int64_t batch, int64_t heads,
    int64_t tokens, int64_t dim,
                     int64_t x0, int64_t x1, int64_t x2, int64_t table0, void* out) {
    int64_t half = dim / 2;
    float product[2];
    auto rounded = [type](float value) {
        uint32_t held = 0;
        put(&held, 0, type, value);
        return get(&held, 0, type);
    };
    for (int64_t i = 0; i < batch * heads * tokens; i++) {
        int64_t b = i / tokens / heads, n = i / tokens % heads, t = i % tokens, from = b * x0 + n * x1 + t * x2,
            table = b * table0 + t * dim;
        for (int64_t k = 0; k < dim; k++) {
            float turned = k < half ? -get(x, from + k + half, type) : get(x, from + k - half, type);
            product[0] = rounded(get(x, from + k, type) * get(cos, table + k, type));
            product[1] = rounded(turned * get(sin, table + k, type));
            put(out, i * dim + k, type, product[0] + product[1]);
        }
    }
}
