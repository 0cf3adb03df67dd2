// Numbers of three types, eight at a time: always fp32 in a register, rounded where they are stored.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "threads.h"

#if defined __AVX512VNNI__ && defined __AVX512BW__ && defined __AVX512DQ__ && defined __AVX512VL__
#define WIDE  // registers of 64 bytes, and one instruction that multiplies 16 bits and adds
#endif

namespace {

constexpr int64_t FEW = 16;         // tokens that are multiplied with one row after the other
constexpr int64_t AHEAD = 8192;     // bytes of a matrix that the second-level cache asks for before they are read

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

__m256i load(const void* data) { return _mm256_loadu_si256(static_cast<const __m256i*>(data)); }
void store(void* data, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(data), v); }
__m128i load_half(const void* data) { return _mm_loadu_si128(static_cast<const __m128i*>(data)); }
void store_half(void* data, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(data), v); }

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
__attribute__((always_inline)) inline __m256 get8(const void* data, int64_t i, int type) {
    if (type == FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(data) + i);
    __m128i halves = load_half(static_cast<const uint16_t*>(data) + i);
    return type == FLOAT16 ? _mm256_cvtph_ps(halves)
                           : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

__attribute__((always_inline)) inline void put8(void* data, int64_t i, int type, __m256 v) {
    if (type == FLOAT32) return _mm256_storeu_ps(static_cast<float*>(data) + i, v);
    __m128i halves;
    if (type == FLOAT16) {
        halves = _mm256_cvtps_ph(v, 0);
    } else {
        __m256i bits = bfloat16_bits(v);
        halves = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    }
    store_half(static_cast<uint16_t*>(data) + i, halves);
}

int64_t size(int type) { return type == FLOAT32 ? 4 : 2; }

// The same for the last few of a row: `count` numbers, zeros behind them.
__attribute__((always_inline)) inline __m256 get8(const void* data, int64_t i, int type, int64_t count) {
    if (count >= 8) return get8(data, i, type);
    uint8_t some[32] = {};
    std::memcpy(some, static_cast<const uint8_t*>(data) + i * size(type), count * size(type));
    return get8(some, 0, type);
}

__attribute__((always_inline)) inline void put8(void* data, int64_t i, int type, __m256 v, int64_t count) {
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

// sum + a b, sixteen products of 16 bits added in pairs.
__m256i add_products(__m256i sum, __m256i a, __m256i b) {
#if defined WIDE
    return _mm256_dpwssd_epi32(sum, a, b);
#elif defined __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

// As many numbers as a register holds; `eight` of the same total. Of integers, products of 16 bits are added in pairs.

struct Eight {
    static constexpr int64_t N = 8;
    __m256i all = _mm256_setzero_si256();

    static Eight at(const void* from) { return {load(from)}; }
    static Eight of(int32_t x) { return {_mm256_set1_epi32(x)}; }
    static Eight widened(const void* from) { return {_mm256_cvtepi8_epi16(load_half(from))}; }  // sixteen, of 8 bits
    template <int I> Eight nibble() const {  // of every sixteen bits
        Eight low = {_mm256_srli_epi16(all, 4 * I)};
        return I == 3 ? low : Eight{_mm256_and_si256(low.all, _mm256_set1_epi16(15))};
    }
    Eight operator+(Eight b) const { return {_mm256_add_epi32(all, b.all)}; }
    void add_products(Eight a, Eight b) { all = ::add_products(all, a.all, b.all); }
    __m256i eight() const { return all; }
};

#ifdef WIDE
struct Floats {
    static constexpr int64_t N = 16;
    __m512 all = _mm512_setzero_ps();

    static Floats at(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Floats of(float x) { return {_mm512_set1_ps(x)}; }
    void put(float* to) const { _mm512_storeu_ps(to, all); }
    Floats operator*(Floats b) const { return {_mm512_mul_ps(all, b.all)}; }
    void add_product(Floats a, Floats b) { all = _mm512_fmadd_ps(a.all, b.all, all); }
    __m256 eight() const { return _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1)); }
};

struct Integers {
    static constexpr int64_t N = 16;
    __m512i all = _mm512_setzero_si512();

    static Integers at(const void* from) { return {_mm512_loadu_si512(from)}; }
    static Integers of(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Integers widened(const void* from) { return {_mm512_cvtepi8_epi16(load(from))}; }
    template <int I> Integers nibble() const {  // of every sixteen bits
        Integers low = {_mm512_srli_epi16(all, 4 * I)};
        return I == 3 ? low : Integers{_mm512_and_si512(low.all, _mm512_set1_epi16(15))};
    }
    Integers operator+(Integers b) const { return {_mm512_add_epi32(all, b.all)}; }
    void add_products(Integers a, Integers b) { all = _mm512_dpwssd_epi32(all, a.all, b.all); }
    __m256i eight() const { return _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1)); }
};

Floats floats(Integers x) { return {_mm512_cvtepi32_ps(x.all)}; }
#else
struct Floats {
    static constexpr int64_t N = 8;
    __m256 all = _mm256_setzero_ps();

    static Floats at(const float* from) { return {_mm256_loadu_ps(from)}; }
    static Floats of(float x) { return {_mm256_set1_ps(x)}; }
    void put(float* to) const { _mm256_storeu_ps(to, all); }
    Floats operator*(Floats b) const { return {_mm256_mul_ps(all, b.all)}; }
    void add_product(Floats a, Floats b) { all = _mm256_fmadd_ps(a.all, b.all, all); }
    __m256 eight() const { return all; }
};

using Integers = Eight;

Floats floats(Integers x) { return {_mm256_cvtepi32_ps(x.all)}; }
#endif

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

__m256 silu8(__m256 x) {
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1), exp8(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

__m256 sigmoid8(__m256 x) {
    __m256 one = _mm256_set1_ps(1);
    return _mm256_div_ps(one, _mm256_add_ps(one, exp8(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

// Word j of register i and word i of register j change places.
void transpose_words(__m256i* v) {
    __m256i pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
}

// Memory for so many, as it is, from a line of the cache on: no register is read out of two lines. Aligned by hand, for where
// the C library does it, it leaves holes in its heap.
template <typename T>
class Aligned {
    static constexpr uintptr_t LINE_BYTES = 64;
    std::unique_ptr<uint8_t[]> memory;
    T* first;

   public:
    explicit Aligned(int64_t count) : memory(new uint8_t[count * sizeof(T) + LINE_BYTES]) {
        first = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES);
    }
    T* get() const { return first; }
    T& operator[](int64_t i) const { return first[i]; }
};

// f with a type known when compiled.
template <typename F>
void with_type(int type, F f) {
    if (type == FLOAT32) return f(std::integral_constant<int, FLOAT32>());
    if (type == BFLOAT16) return f(std::integral_constant<int, BFLOAT16>());
    f(std::integral_constant<int, FLOAT16>());
}

}  // namespace
