// What a Gated DeltaNet has between its projections: of one token all of it, the state read once from memory and written once;
// of a prompt its convolution, its rule and its norm. The rule goes token by token there too, a few columns of the state in the
// first-level cache: it has fewer products than the chunks that a GPU takes.
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
    __m256 squares = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += 8) {
        __m256 v = get8(x, i, FLOAT32, count - i);
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    float by = float(1 / std::sqrt(double(total(squares)) + 1e-6));
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

// `ops.gated_rms_norm` of x[from ...], behind the rule.
template <int TYPE>
void gated_norm_row(const void* x, int64_t from, const void* gate, int64_t at, const void* weight, float eps, bool sigmoid,
                    int64_t width, void* out, int64_t to) {
    uint8_t normed[MOST * 4];
    norm_row<TYPE>(x, from, weight, eps, width, normed, 0);
    for (int64_t c = 0; c < width; c += 8) {
        __m256 g = get8(gate, at + c, TYPE, width - c);
        g = sigmoid ? sigmoid8(g) : silu8(g);
        put8(out, to + c, TYPE, _mm256_mul_ps(get8(normed, c, TYPE, width - c), g), width - c);
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
            uint8_t result[MOST * 4];
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
                gated_norm_row<TYPE>(result, 0, z, sequence * z0 + head * z1, norm_weight, eps, sigmoid, width, out, i * width);
            }
        }, MANY_PARTS);
    });
}

// `ops.causal_conv1d` of x (batch, tokens, channels), its last axis contiguous, weight (channels, taps) and a window (batch,
// channels, taps) or null, summed and rounded as `convolve` does it: the result, contiguous, and the window after it.
void causal_conv1d(const void* x, const void* weight, const void* window, int type, int64_t batch, int64_t tokens,
                   int64_t channels, int64_t taps, int64_t x0, int64_t x1, void* after, void* out) {
    int64_t padded = (channels + 7) / 8 * 8;
    std::vector<float> weights(taps * padded), before(batch * taps * padded);  // (tap, channel), (batch, tap, channel)
    for (int64_t c = 0; c < channels; c++)
        for (int64_t tap = 0; tap < taps; tap++) {
            weights[tap * padded + c] = get(weight, c * taps + tap, type);
            for (int64_t b = 0; window && b < batch; b++)
                before[(b * taps + tap) * padded + c] = get(window, (b * channels + c) * taps + tap, type);
        }
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        auto input = [&](int64_t b, int64_t t, int64_t c) {
            if (t < 0) return _mm256_loadu_ps(&before[(b * taps + taps + t) * padded + c]);
            return get8(x, b * x0 + t * x1 + c, TYPE, channels - c);
        };
        share(batch * tokens, batch * tokens * channels * taps, [&](int64_t i, int64_t last) {
            for (; i < last; i++)
                for (int64_t c = 0; c < channels; c += 8) {
                    __m256 sum = _mm256_setzero_ps();
                    for (int64_t tap = 0; tap < taps; tap++) {
                        __m256 v = input(i / tokens, i % tokens - taps + 1 + tap, c);
                        sum = _mm256_add_ps(sum, _mm256_mul_ps(v, _mm256_loadu_ps(&weights[tap * padded + c])));
                    }
                    put8(out, i * channels + c, TYPE, silu8(rounded(sum, TYPE)), channels - c);
                }
        });
        for (int64_t b = 0; b < batch; b++)
            for (int64_t c = 0; c < channels; c++)
                for (int64_t tap = 0; tap < taps; tap++) {
                    alignas(32) float eight[8];
                    _mm256_store_ps(eight, input(b, tokens - taps + tap, c / 8 * 8));
                    put8(after, (b * channels + c) * taps + tap, TYPE, _mm256_set1_ps(eight[c % 8]), 1);
                }
    });
}

// A token's q or k for the rule: where its unit vector of `keys` numbers lies.
struct Units {
    const float* data;
    int64_t keys, groups;

    const float* at(int64_t token, int64_t group) const { return data + (token * groups + group) * keys; }
};

// N registers of columns of a state S (keys, width), or `count` columns, through all tokens: what S holds under the next token's
// key is summed while this one's is written. v and out are read and written at `at` numbers, and so many further for the next
// token.
template <int64_t N, int TYPE>
void delta_tokens(float* state, int64_t keys, int64_t width, int64_t count, int64_t tokens, int64_t group, const Units& q,
                  const Units& k, const void* v, int64_t v_at, int64_t v_step, const float* g, const float* beta,
                  int64_t heads, void* out, int64_t out_at, int64_t out_step) {
    constexpr int64_t COLUMNS = N * Floats::N;
    auto left = [&](int64_t c) { return std::max<int64_t>(count - c, 0); };
    Aligned<float> memory(keys * COLUMNS);
    Floats held[N];
    for (int64_t d = 0; d < keys; d++) {
        float* row = &memory[d * COLUMNS];
        for (int64_t c = 0; c < COLUMNS; c += 8) _mm256_storeu_ps(row + c, get8(state, d * width + c, FLOAT32, left(c)));
        for (int64_t n = 0; n < N; n++) held[n].add_product(Floats::at(row + n * Floats::N), Floats::of(k.at(0, group)[d]));
    }
    for (int64_t t = 0; t < tokens; t++) {
        const float *now = k.at(t, group), *next = k.at(std::min(t + 1, tokens - 1), group), *query = q.at(t, group);
        const float decay = std::exp(g[t * heads]);
        alignas(64) float values[COLUMNS];  // of v, then of what is read
        for (int64_t c = 0; c < COLUMNS; c += 8) _mm256_store_ps(values + c, get8(v, v_at + t * v_step + c, TYPE, left(c)));
        Floats error[N], read[N];
        for (int64_t n = 0; n < N; n++) {
            Floats value = Floats::at(values + n * Floats::N);
            value.add_product(Floats::of(-decay), held[n]);
            error[n] = Floats::of(beta[t * heads]) * value;
            held[n] = Floats();
        }
        for (int64_t d = 0; d < keys; d++)
            for (int64_t n = 0; n < N; n++) {
                float* at = &memory[d * COLUMNS + n * Floats::N];
                Floats s = Floats::of(decay) * Floats::at(at);
                s.add_product(Floats::of(now[d]), error[n]);
                read[n].add_product(s, Floats::of(query[d]));
                held[n].add_product(s, Floats::of(next[d]));
                s.put(at);
            }
        for (int64_t n = 0; n < N; n++) read[n].put(values + n * Floats::N);
        for (int64_t c = 0; c < COLUMNS && c < count; c += 8)
            put8(out, out_at + t * out_step + c, TYPE, _mm256_load_ps(values + c), count - c);
    }
    for (int64_t d = 0; d < keys; d++)
        for (int64_t c = 0; c < COLUMNS && c < count; c += 8)
            put8(state, d * width + c, FLOAT32, _mm256_loadu_ps(&memory[d * COLUMNS + c]), count - c);
}

// `ops.gated_delta_rule` of q and k (batch, tokens, groups, keys) and v (batch, tokens, heads, width), last axes contiguous; g and
// beta (batch, tokens, heads) and the state (batch, heads, keys, width), which is written to, contiguous and fp32.
void gated_delta_rule(const void* q, const void* k, const void* v, int type, const float* g, const float* beta, float* state,
                      int64_t batch, int64_t tokens, int64_t groups, int64_t heads, int64_t keys, int64_t width, int64_t q0,
                      int64_t q1, int64_t q2, int64_t k0, int64_t k1, int64_t k2, int64_t v0, int64_t v1, int64_t v2, void* out) {
    constexpr int64_t BESIDE = 2;  // registers of columns: with their sums and errors they are half of AVX2's
    constexpr int64_t COLUMNS = BESIDE * Floats::N;
    int64_t rows = batch * tokens * groups, blocks = (width + COLUMNS - 1) / COLUMNS;
    std::vector<float> units(2 * rows * keys);
    share(2 * rows, 2 * rows * keys, [&](int64_t i, int64_t last) {
        for (; i < last; i++) {
            int64_t row = i % rows, b = row / groups / tokens, t = row / groups % tokens, group = row % groups;
            float wide[MOST];
            int64_t from = i < rows ? b * q0 + t * q1 + group * q2 : b * k0 + t * k1 + group * k2;
            for (int64_t d = 0; d < keys; d += 8)
                put8(wide, d, FLOAT32, get8(i < rows ? q : k, from + d, type, keys - d), keys - d);
            to_unit(wide, keys, i < rows ? float(1 / std::sqrt(double(keys))) : 1, &units[i * keys]);
        }
    });
    with_type(type, [&](auto known) {
        share(batch * heads * blocks, batch * heads * tokens * keys * width, [&](int64_t i, int64_t last) {
            for (; i < last; i++) {
                int64_t b = i / blocks / heads, head = i / blocks % heads, c = i % blocks * COLUMNS;
                Units queries = {&units[b * tokens * groups * keys], keys, groups};
                Units keyed = {&units[(rows + b * tokens * groups) * keys], keys, groups};
                int64_t gates = b * tokens * heads + head;
                delta_tokens<BESIDE, decltype(known)::value>(
                    state + i / blocks * keys * width + c, keys, width, width - c, tokens, head / (heads / groups), queries, keyed,
                    v, b * v0 + head * v2 + c, v1, g + gates, beta + gates, heads, out, (b * tokens * heads + head) * width + c,
                    heads * width);
            }
        }, MANY_PARTS);
    });
}

// `ops.gated_rms_norm` of x (rows, heads, width), contiguous, and a gate with strides, its last axis contiguous.
void gated_rms_norm(const void* x, const void* gate, const void* weight, int type, float eps, int64_t rows, int64_t heads,
                    int64_t width, int64_t gate0, int64_t gate1, bool sigmoid, void* out) {
    with_type(type, [&](auto known) {
        share(rows * heads, rows * heads * width, [&](int64_t i, int64_t last) {
            for (; i < last; i++)
                gated_norm_row<decltype(known)::value>(x, i * width, gate, i / heads * gate0 + i % heads * gate1, weight, eps,
                                                       sigmoid, width, out, i * width);
        });
    });
}

}  // namespace
