// y = x W^T + bias with a matrix as it is, for a few tokens: at the speed at which memory gives the matrix.
#pragma once

#include "numbers.h"

namespace {

constexpr int64_t ROWS = 8;  // that one thread takes at a time, for all tokens while they are in its cache
#ifdef WIDE
constexpr int64_t ABREAST = 4;  // tokens that are multiplied with a row at once: four sums each in 32 registers
#else
constexpr int64_t ABREAST = 2;  // in 16
#endif

// A row times T tokens of x (T, padded), which are fp32 with zeros behind them. Each is summed as if it were alone.
template <int TYPE, int64_t T>
void dot_row(const void* w, int64_t first, int64_t columns, const float* x, int64_t padded, float* y) {
    constexpr int64_t N = 4;  // sums of a token, so that one need not wait for the other
    __m256 sums[T][N];
    for (auto& of_token : sums)
        for (auto& sum : of_token) sum = _mm256_setzero_ps();
    auto add = [&](__m256 v, int64_t k, int64_t lane) {
        for (int64_t t = 0; t < T; t++) sums[t][lane] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + t * padded + k), sums[t][lane]);
    };
    int64_t k = 0;
    for (; k + 8 * N <= columns; k += 8 * N) {
        for (int64_t line = 0; line < 8 * N * size(TYPE); line += 64)
            _mm_prefetch(static_cast<const char*>(w) + (first + k) * size(TYPE) + AHEAD + line, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int64_t lane = 0; lane < N; lane++) add(get8(w, first + k + 8 * lane, TYPE), k + 8 * lane, lane);
    }
    for (; k < columns; k += 8) add(get8(w, first + k, TYPE, columns - k), k, 0);
    for (int64_t t = 0; t < T; t++) {
        for (int64_t lane = 1; lane < N; lane++) sums[t][0] = _mm256_add_ps(sums[t][0], sums[t][lane]);
        y[t * ROWS] = total(sums[t][0]);
    }
}

// The same for 1 to ABREAST tokens.
template <int TYPE, int64_t T = ABREAST, typename... Rest>
void dot_row_of(int64_t tokens, const Rest&... rest) {
    if constexpr (T > 1)
        if (tokens < T) return dot_row_of<TYPE, T - 1>(tokens, rest...);
    dot_row<TYPE, T>(rest...);
}

// `rows` rows of `count` numbers in fp32, zeros behind each up to the next multiple of eight.
std::vector<float> widened(const void* x, int64_t from, int type, int64_t rows, int64_t count) {
    int64_t padded = (count + 7) / 8 * 8;
    std::vector<float> wide(rows * padded);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < count; k += 8)
            _mm256_storeu_ps(&wide[row * padded + k], get8(x, from + row * count + k, type, count - k));
    return wide;
}

// `ops.linear` of x (tokens, columns) and w (rows, columns), both contiguous, summed in fp32. Up to FEW tokens: `operations.py`
// brings no more.
void linear(const void* w, int64_t rows, int64_t columns, const void* x, int type, int64_t tokens, const void* bias, void* out) {
    int64_t padded = (columns + 7) / 8 * 8;
    std::vector<float> wide = widened(x, 0, type, tokens, columns);
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        share((rows + ROWS - 1) / ROWS, rows * columns, [&](int64_t block, int64_t last) {
            for (; block < last; block++) {
                int64_t first = block * ROWS, count = std::min(ROWS, rows - first);
                float y[FEW * ROWS] = {}, offset[ROWS] = {};
                for (int64_t i = 0; i < count; i++) {
                    offset[i] = bias ? get(bias, first + i, TYPE) : 0;
                    for (int64_t t = 0; t < tokens; t += ABREAST)
                        dot_row_of<TYPE>(tokens - t, w, (first + i) * columns, columns, &wide[t * padded], padded,
                            y + t * ROWS + i);
                }
                for (int64_t t = 0; t < tokens; t++)
                    put8(out, t * rows + first, TYPE, _mm256_add_ps(_mm256_loadu_ps(y + t * ROWS), _mm256_loadu_ps(offset)),
                         count);
            }
        });
    });
}

}  // namespace
