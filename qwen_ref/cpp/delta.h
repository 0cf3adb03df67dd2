// One token of a Gated DeltaNet, between its projections: the state is read once from memory, and written once.
#pragma once

#include "rows.h"

namespace {

// The window of one channel moves on by x, and the sum of its taps: `ops.causal_conv1d` of one token, not yet rounded, before silu.
template <int TYPE>
float convolve(const void* x, int64_t at, const void* weight, void* window, int64_t first, int64_t taps, int64_t channel) {
    using Cell = std::conditional_t<TYPE == FLOAT32, float, uint16_t>;
    auto held = static_cast<Cell*>(window) + first;  // (taps,)
    float sum = 0;
    for (int64_t tap = 0; tap < taps; tap++) {
        held[tap] = tap + 1 < taps ? held[tap + 1] : static_cast<const Cell*>(x)[at];
        sum += get(held, tap, TYPE) * get(weight, channel * taps + tap, TYPE);
    }
    return sum;
}

// x to length one, as `ops.l2_norm`, times `scale`.
void to_unit(const float* x, int64_t count, float scale, float* out) {
    double squares = 1e-6;
    for (int64_t i = 0; i < count; i++) squares += double(x[i]) * x[i];
    float by = float(1 / std::sqrt(squares));
    for (int64_t i = 0; i < count; i++) out[i] = x[i] * by * scale;
}

// 8 N columns of a state S (keys, width), or `count` of the last eight: S <- decay S + k u with u = share (v - decay S^T k), and
// S^T q after it, which is decay S^T q + (k.q) u: one pass for both sums over S, and a second while it is in the cache.
template <int64_t N>
void delta_columns(float* state, int64_t keys, int64_t width, int64_t count, const float* q, const float* k, float kq,
                   const float* v, float decay, float share, float* out) {
    auto at = [&](int64_t d, int64_t n) { return d * width + 8 * n; };
    __m256 by_k[N], by_q[N], forgetting = _mm256_set1_ps(decay);
    for (int64_t n = 0; n < N; n++) by_k[n] = by_q[n] = _mm256_setzero_ps();
    for (int64_t d = 0; d < keys; d++)
        for (int64_t n = 0; n < N; n++) {
            __m256 s = get8(state, at(d, n), FLOAT32, count - 8 * n);
            by_k[n] = _mm256_fmadd_ps(s, _mm256_set1_ps(k[d]), by_k[n]);
            by_q[n] = _mm256_fmadd_ps(s, _mm256_set1_ps(q[d]), by_q[n]);
        }
    for (int64_t n = 0; n < N; n++) {
        __m256 error = _mm256_fnmadd_ps(forgetting, by_k[n], get8(v, 8 * n, FLOAT32, count - 8 * n));
        by_k[n] = _mm256_mul_ps(_mm256_set1_ps(share), error);
        __m256 read = _mm256_fmadd_ps(forgetting, by_q[n], _mm256_mul_ps(_mm256_set1_ps(kq), by_k[n]));
        put8(out, 8 * n, FLOAT32, read, count - 8 * n);
    }
    for (int64_t d = 0; d < keys; d++)
        for (int64_t n = 0; n < N; n++) {
            __m256 s = _mm256_mul_ps(forgetting, get8(state, at(d, n), FLOAT32, count - 8 * n));
            put8(state, at(d, n), FLOAT32, _mm256_fmadd_ps(_mm256_set1_ps(k[d]), by_k[n], s), count - 8 * n);
        }
}

// `ops.gated_delta_step`: mixed (batch, channels), q|k|v of G, G and `heads` heads; window (batch, channels, taps) and state
// (batch, heads, keys, width) fp32, both contiguous and written to; a, b (batch, heads); z (batch, heads, width).
void gated_delta_step(const void* mixed, void* window, const void* conv_weight, const void* a, const void* b, const void* a_log,
                      const void* dt_bias, const void* z, const void* norm_weight, int type, float eps, float* state,
                      int64_t batch, int64_t channels, int64_t taps, int64_t heads, int64_t keys, int64_t width, int64_t mixed0,
                      int64_t a0, int64_t b0, int64_t z0, int64_t z1, bool sigmoid, void* out) {
    constexpr int64_t BESIDE = 4;  // registers of columns: their two sums leave room for what they are made of
    int64_t all = (channels + 7) / 8, groups = (channels - heads * width) / (2 * keys);
    std::vector<float> memory(batch * all * 8);
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        share(batch * all, 4 * batch * channels * taps, [&](int64_t i, int64_t last) {
            for (; i < last; i++) {
                int64_t sequence = i / all, first = i % all * 8, end = std::min(channels, first + 8);
                float* conved = &memory[i * 8];
                for (int64_t c = first; c < end; c++)
                    conved[c - first] = convolve<TYPE>(mixed, sequence * mixed0 + c, conv_weight, window,
                        (sequence * channels + c) * taps, taps, c);
                _mm256_storeu_ps(conved, rounded(silu8(rounded(_mm256_loadu_ps(conved), TYPE)), TYPE));
            }
        });
        share(batch * heads, batch * heads * keys * width, [&](int64_t i, int64_t last) {
            float q[MOST], k[MOST], read[MOST];
            uint8_t result[MOST * 4], normed[MOST * 4];
            for (; i < last; i++) {
                int64_t sequence = i / heads, head = i % heads, group = head / (heads / groups);
                const float* conved = &memory[sequence * all * 8];
                to_unit(conved + group * keys, keys, float(1 / std::sqrt(double(keys))), q);
                to_unit(conved + (groups + group) * keys, keys, 1, k);
                const float* v = conved + 2 * groups * keys + head * width;
                double rate = std::exp(double(get(a_log, head, TYPE)));
                double step = double(get(a, sequence * a0 + head, TYPE) + get(dt_bias, head, TYPE));
                step = std::max(step, 0.) + std::log1p(std::exp(-std::abs(step)));  // softplus
                float decay = float(std::exp(-rate * step)), kq = 0;
                __m256 beta = rounded(sigmoid8(_mm256_set1_ps(get(b, sequence * b0 + head, TYPE))), TYPE);
                for (int64_t d = 0; d < keys; d++) kq += k[d] * q[d];
                auto columns = [&](auto beside, int64_t c, int64_t count) {
                    delta_columns<decltype(beside)::value>(state + i * keys * width + c, keys, width, count, q, k, kq, v + c,
                        decay, _mm256_cvtss_f32(beta), read + c);
                };
                int64_t c = 0;
                for (; c + 8 * BESIDE <= width; c += 8 * BESIDE)
                    columns(std::integral_constant<int64_t, BESIDE>(), c, 8 * BESIDE);
                for (; c < width; c += 8) columns(std::integral_constant<int64_t, 1>(), c, std::min<int64_t>(width - c, 8));
                for (c = 0; c < width; c += 8) put8(result, c, TYPE, get8(read, c, FLOAT32, width - c), width - c);
                norm_row<TYPE>(result, 0, norm_weight, eps, width, normed, 0);
                for (c = 0; c < width; c += 8) {
                    __m256 gate = get8(z, sequence * z0 + head * z1 + c, TYPE, width - c);
                    gate = sigmoid ? sigmoid8(gate) : silu8(gate);
                    put8(out, i * width + c, TYPE, _mm256_mul_ps(get8(normed, c, TYPE, width - c), gate), width - c);
                }
            }
        }, MANY_PARTS);
    });
}

}  // namespace
