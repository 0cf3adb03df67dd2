// What lies between the products: norms, rotation, and gates, every row by itself.
#pragma once

#include "numbers.h"

namespace {

constexpr int64_t MOST = 1024;  // numbers of a head that is normed and rotated at once

// `columns` numbers from x + from on, normed as by `ops.rms_norm`: rounded to the type before the weight, as there. `centred`:
// as by `ops.zero_centred_rms_norm`, the weight from `by` on.
template <int TYPE>
void norm_row(const void* x, int64_t from, const void* weight, float eps, int64_t columns, void* out, int64_t to,
              bool centred = false, int64_t by = 0) {
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
        __m256 v = _mm256_mul_ps(get8(x, from + k, TYPE, columns - k), scale), w = get8(weight, by + k, TYPE, columns - k);
        put8(out, to + k, TYPE, centred ? _mm256_mul_ps(v, _mm256_add_ps(_mm256_set1_ps(1), w))
                                        : _mm256_mul_ps(rounded(v, TYPE), w), columns - k);
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

// `ops.rms_norm` over rows of x: rounded to x's type before the weight, as there.
void rms_norm(const void* x, const void* weight, int type, float eps, int64_t rows, int64_t columns, void* out) {
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        share(rows, rows * columns, [&](int64_t row, int64_t last) {
            for (; row < last; row++) norm_row<TYPE>(x, row * columns, weight, eps, columns, out, row * columns);
        });
    });
}

// `ops.zero_centred_rms_norm` over rows of x, which take turns at the rows of the weight (groups, columns).
void zero_centred_rms_norm(const void* x, const void* weight, int type, float eps, int64_t rows, int64_t columns, int64_t groups,
                           void* out) {
    with_type(type, [&](auto known) {
        share(rows, rows * columns, [&](int64_t row, int64_t last) {
            for (; row < last; row++)
                norm_row<decltype(known)::value>(x, row * columns, weight, eps, columns, out, row * columns, true,
                                                 row % groups * columns);
        });
    });
}

// `ops.add_rms_norm`: the sum is rounded to its type before it is normed.
void add_rms_norm(const void* x, const void* residual, const void* weight, int type, float eps, bool centred, int64_t rows,
                  int64_t columns, void* total, void* out) {
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        share(rows, rows * columns, [&](int64_t row, int64_t last) {
            for (; row < last; row++) {
                int64_t first = row * columns;
                for (int64_t k = 0; k < columns; k += 8) {
                    __m256 a = get8(x, first + k, TYPE, columns - k), b = get8(residual, first + k, TYPE, columns - k);
                    put8(total, first + k, TYPE, _mm256_add_ps(a, b), columns - k);
                }
                norm_row<TYPE>(total, first, weight, eps, columns, out, first, centred);
            }
        });
    });
}

// `ops.rope` of x (batch, heads, tokens, dim), of which only the last axis need be contiguous.
void rope(const void* x, const void* cos, const void* sin, int type, int64_t batch, int64_t heads, int64_t tokens,
                     int64_t dim, int64_t x0, int64_t x1, int64_t x2, int64_t table0, void* out) {
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        share(batch * heads * tokens, batch * heads * tokens * dim, [&](int64_t i, int64_t last) {
            for (; i < last; i++) {
                int64_t b = i / tokens / heads, t = i % tokens, from = b * x0 + i / tokens % heads * x1 + t * x2;
                rotate_row<TYPE>(x, from, cos, sin, b * table0 + t * dim, dim, out, i * dim);
            }
        });
    });
}

// `ops.norm_rope_write` of q (tokens, heads, dim), k and v (tokens, kv_heads, dim), last axes contiguous, weights perhaps
// null, tables (tokens, turned), into caches of `pages` x kv_heads x `page` x dim. 1 if a slot lies outside: nothing is done then.
int norm_rope_write(const void* q, const void* k, const void* v, const void* q_weight, const void* k_weight,
                               int type, float eps, bool centred, int64_t turned, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t q0,
                               int64_t q1, int64_t k0, int64_t k1, int64_t v0, int64_t v1, const void* cos, const void* sin,
                               const int64_t* slots, int64_t pages, int64_t page, int64_t kc0, int64_t kc1, int64_t kc2,
                               int64_t vc0, int64_t vc1, int64_t vc2, void* k_cache, void* v_cache, void* out) {
    for (int64_t t = 0; t < tokens; t++)
        if (slots[t] >= pages * page) return 1;
    int64_t all = heads + 2 * kv_heads;
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        auto carry = [&](const void* x, int64_t from, const void* weight, int64_t t, void* to, int64_t at) {
            uint8_t normed[MOST * 4];
            if (weight) norm_row<TYPE>(x, from, weight, eps, dim, normed, 0, centred), x = normed, from = 0;
            rotate_row<TYPE>(x, from, cos, sin, t * turned, turned, to, at);
            std::memcpy(static_cast<uint8_t*>(to) + (at + turned) * size(TYPE),
                        static_cast<const uint8_t*>(x) + (from + turned) * size(TYPE), (dim - turned) * size(TYPE));
        };
        share(tokens * all, tokens * all * dim, [&](int64_t i, int64_t last) {
            for (; i < last; i++) {
                int64_t t = i / all, head = i % all, slot = slots[t];
                if (head < heads) {
                    carry(q, t * q0 + head * q1, q_weight, t, out, (t * heads + head) * dim);
                    continue;
                }
                if (slot < 0) continue;
                int64_t kv = (head - heads) % kv_heads, row = slot / page, entry = slot % page;
                if (head < heads + kv_heads) {
                    carry(k, t * k0 + kv * k1, k_weight, t, k_cache, row * kc0 + kv * kc1 + entry * kc2);
                } else {
                    auto from = static_cast<const uint8_t*>(v) + (t * v0 + kv * v1) * size(TYPE);
                    auto to = static_cast<uint8_t*>(v_cache) + (row * vc0 + kv * vc1 + entry * vc2) * size(TYPE);
                    std::memcpy(to, from, dim * size(TYPE));
                }
            }
        });
    });
    return 0;
}

// `ops.swiglu` of rows with gaps between them: silu(gate) is rounded before it is multiplied.
void swiglu(const void* gate, const void* up, int type, int64_t rows, int64_t columns, int64_t gate0, int64_t up0,
                       void* out) {
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        int64_t parts = (columns + SMALL - 1) / SMALL;
        share(rows * parts, rows * columns, [&](int64_t i, int64_t end) {
            for (; i < end; i++) {
                int64_t row = i / parts, first = i % parts * SMALL, last = std::min(columns, first + SMALL);
                for (int64_t k = first; k < last; k += 8) {
                    __m256 silu = rounded(silu8(get8(gate, row * gate0 + k, TYPE, last - k)), TYPE);
                    __m256 y = _mm256_mul_ps(silu, get8(up, row * up0 + k, TYPE, last - k));
                    put8(out, row * columns + k, TYPE, y, last - k);
                }
            }
        });
    });
}

// Bytes from one place to another, where a tape holds what PyTorch copied.
void copy(void* to, const void* from, int64_t bytes) {
    constexpr int64_t PAGE = 4096;
    share((bytes + PAGE - 1) / PAGE, bytes / 4, [&](int64_t page, int64_t last) {
        int64_t first = page * PAGE;
        std::memcpy(static_cast<uint8_t*>(to) + first, static_cast<const uint8_t*>(from) + first, std::min(last * PAGE, bytes) - first);
    });
}

// `ops.take_columns` of x (rows, columns), contiguous. 1 if a column is named that there is not: nothing is done then.
int take_columns(const void* x, int type, int64_t rows, int64_t columns, const int64_t* order, int64_t count, void* out) {
    for (int64_t i = 0; i < count; i++)
        if (order[i] < 0 || order[i] >= columns) return 1;
    auto take = [&](auto number) {
        using Number = decltype(number);
        auto from = static_cast<const Number*>(x);
        auto to = static_cast<Number*>(out);
        share(rows, rows * count, [&](int64_t row, int64_t last) {
            for (; row < last; row++)
                for (int64_t i = 0; i < count; i++) to[row * count + i] = from[row * columns + order[i]];
        });
    };
    if (type == FLOAT32) take(uint32_t());
    else take(uint16_t());
    return 0;
}

// `ops.sigmoid_gate` of x and perhaps a residual (rows, heads, dim), contiguous, and a gate with strides, the last 1 or 0. The
// sigmoid, the product and the sum are each rounded.
void sigmoid_gate(const void* x, const void* gate, const void* residual, int type, int64_t rows, int64_t heads, int64_t dim,
                  int64_t gate0, int64_t gate1, int64_t gate2, void* out) {
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        share(rows * heads, rows * heads * dim, [&](int64_t i, int64_t last) {
            for (; i < last; i++) {
                int64_t from = i / heads * gate0 + i % heads * gate1;
                for (int64_t k = 0; k < dim; k += 8) {
                    __m256 g = gate2 ? get8(gate, from + k, TYPE, dim - k) : _mm256_set1_ps(get(gate, from, TYPE));
                    __m256 v = _mm256_mul_ps(get8(x, i * dim + k, TYPE, dim - k), rounded(sigmoid8(g), TYPE));
                    if (residual) v = _mm256_add_ps(get8(residual, i * dim + k, TYPE, dim - k), rounded(v, TYPE));
                    put8(out, i * dim + k, TYPE, v, dim - k);
                }
            }
        });
    });
}

}  // namespace
