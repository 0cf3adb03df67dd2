// Attention of a prompt in bfloat16 on a CPU's matrix unit. Scores, softmax and sums are fp32; softmax's weights are rounded to
// bfloat16 before they multiply the values, as the formula rounds them, and as FlashAttention does on a GPU.
#pragma once

#include "attention.h"
#include "tiles.h"

namespace {

#ifdef __AMX_BF16__

constexpr int64_t AT_ONCE = 128;  // keys whose scores are held

// Keys and values of a sequence and kv head as the unit takes them.
struct Paired {
    const Line* keys;    // (DEEP of dim, SIDE keys, pair of dim, key, 2)
    const Line* values;  // (DEEP keys, SIDE of dim, pair of keys, dim, 2)
    int64_t sides;       // of SIDE keys, whole AT_ONCE
};

// A tile of values: DEEP keys from `key` on, SIDE of dim from `d` on; zeros behind the last key.
void pair_values(const uint16_t* v, int64_t stride, int64_t key, int64_t keys, int64_t d, Line* out) {
    auto row = [&](int64_t s) { return s < keys ? load(v + s * stride + d) : _mm256_setzero_si256(); };
    for (int64_t p = 0; p < SIDE; p++) {
        __m256i even = _mm256_permute4x64_epi64(row(key + 2 * p), 0xd8), odd = _mm256_permute4x64_epi64(row(key + 2 * p + 1), 0xd8);
        store(out[p].numbers, _mm256_unpacklo_epi16(even, odd));
        store(out[p].numbers + 16, _mm256_unpackhi_epi16(even, odd));
    }
}

// Queries t .. t + tokens of the heads that share a kv head: PANEL_ROWS rows (token, head) at most.
struct Queries {
    int64_t shared, dim, past, t, tokens;
    Aligned<Line> query, weights, scores, sum;
    float most[PANEL_ROWS], mass[PANEL_ROWS];

    Queries(int64_t shared, int64_t dim, int64_t past)
        : shared(shared), dim(dim), past(past), t(0), tokens(0), query(dim / DEEP * PANEL_ROWS),
          weights(AT_ONCE / DEEP * PANEL_ROWS), scores(AT_ONCE / SIDE * PANEL_ROWS),
          sum(dim / SIDE * PANEL_ROWS) {}

    // Of what multiply_tiles sums: SIDE columns of a row, the first of which is `column`.
    static float* cell(const Aligned<Line>& of, int64_t row, int64_t column) {
        int64_t tile = column / SIDE / HALVES * HALVES * HALVES + row / SIDE * HALVES + column / SIDE % HALVES;
        return reinterpret_cast<float*>(&of[tile * SIDE + row % SIDE]);
    }

    void read(const Heads& q, int64_t b, int64_t kv) {
        const uint16_t* from = static_cast<const uint16_t*>(q.data) + b * q.batch;
        for (int64_t r = 0; r < PANEL_ROWS; r++)
            for (int64_t d = 0; d < dim / DEEP; d++) {
                int64_t at = (kv * shared + r % shared) * q.head + (t + r / shared) * q.token + d * DEEP;
                if (r < shared * tokens) std::memcpy(&query[d * PANEL_ROWS + r], from + at, sizeof(Line));
                else query[d * PANEL_ROWS + r] = {};
            }
        std::memset(static_cast<void*>(sum.get()), 0, dim / SIDE * PANEL_ROWS * sizeof(Line));
        std::fill(most, most + PANEL_ROWS, -INFINITY), std::fill(mass, mass + PANEL_ROWS, 0.f);
    }

    // Keys first .. first + AT_ONCE.
    void attend(const Paired& kv, int64_t first) {
        std::memset(static_cast<void*>(scores.get()), 0, AT_ONCE / SIDE * PANEL_ROWS * sizeof(Line));
        for (int64_t s = 0; s < AT_ONCE; s += HALVES * SIDE)
            multiply_tiles(query.get(), kv.keys + (first + s), kv.sides * SIDE, dim / DEEP, cell(scores, 0, s));
        const __m512 root = _mm512_set1_ps(1 / std::sqrt(float(dim)));
        for (int64_t r = 0; r < PANEL_ROWS; r++) {
            alignas(64) float row[AT_ONCE];
            for (int64_t s = 0; s < AT_ONCE; s += SIDE)
                _mm512_store_ps(row + s, _mm512_mul_ps(_mm512_load_ps(cell(scores, r, s)), root));
            int64_t seen = std::min(past + t + std::min(r / shared, tokens - 1) + 1 - first, AT_ONCE);
            float kept = soften(row, std::max<int64_t>(seen, 0), AT_ONCE, most[r], mass[r]);
            for (int64_t s = 0; s < AT_ONCE; s += SIDE)
                store(weights[s / DEEP * PANEL_ROWS + r].numbers + s % DEEP, bfloat16_of(_mm512_load_ps(row + s)));
            for (int64_t d = 0; kept != 1 && d < dim; d += SIDE)
                _mm512_store_ps(cell(sum, r, d), _mm512_mul_ps(_mm512_load_ps(cell(sum, r, d)), _mm512_set1_ps(kept)));
        }
        for (int64_t d = 0; d < dim; d += HALVES * SIDE)
            multiply_tiles(weights.get(), kv.values + (first / DEEP * dim + d), dim, AT_ONCE / DEEP, cell(sum, 0, d));
    }

    void write(int64_t b, int64_t kv, int64_t heads, int64_t queries, uint16_t* out) const {
        for (int64_t r = 0; r < shared * tokens; r++) {
            int64_t to = ((b * queries + t + r / shared) * heads + kv * shared + r % shared) * dim;
            for (int64_t d = 0; d < dim; d += SIDE)
                store(out + to + d, bfloat16_of(_mm512_div_ps(_mm512_load_ps(cell(sum, r, d)), _mm512_set1_ps(mass[r]))));
        }
    }
};

// `attention` of bfloat16, at most PANEL_ROWS heads to a kv head, dim a multiple of DEEP. `paired` has room for twice (batch,
// kv_heads, keys, dim), with keys whole AT_ONCE.
void attention_tiles(const void* q, const uint16_t* k, const uint16_t* v, int64_t batch, int64_t heads, int64_t kv_heads,
                     int64_t queries, int64_t keys, int64_t dim, int64_t q0, int64_t q1, int64_t q2, int64_t k0, int64_t k1,
                     int64_t k2, int64_t v0, int64_t v1, int64_t v2, Line* paired, uint16_t* out) {
    int64_t whole = (keys + AT_ONCE - 1) / AT_ONCE * AT_ONCE, each = whole * dim / DEEP;  // numbers, and lines
    auto at = [&](int64_t pair, bool values) { return &paired[(2 * pair + values) * each]; };
    share(2 * batch * kv_heads * each / SIDE, 2 * batch * kv_heads * keys * dim, [&](int64_t i, int64_t last) {
        for (; i < last; i++) {
            int64_t tile = i % (each / SIDE), pair = i / (each / SIDE) / 2, b = pair / kv_heads, kv = pair % kv_heads;
            bool values = i / (each / SIDE) % 2;
            Line* to = at(pair, values) + tile * SIDE;
            if (values) pair_values(v + b * v0 + kv * v1, v2, tile / (dim / SIDE) * DEEP, keys, tile % (dim / SIDE) * SIDE, to);
            else pair_tokens(k + b * k0 + kv * k1, k2, tile % (whole / SIDE) * SIDE, keys, tile / (whole / SIDE) * DEEP, dim, to);
        }
    });
    int64_t shared = heads / kv_heads, tokens = std::min(queries, PANEL_ROWS / shared), tiles = (queries + tokens - 1) / tokens;
    share(batch * kv_heads * tiles, batch * heads * queries * keys * dim, [&](int64_t i, int64_t last) {
        Queries rows(shared, dim, keys - queries);
        configure_tiles();
        for (; i < last; i++) {
            int64_t b = i / tiles / kv_heads, kv = i / tiles % kv_heads, pair = i / tiles;
            rows.t = (tiles - 1 - i % tiles) * tokens, rows.tokens = std::min(tokens, queries - rows.t);  // the longest first
            rows.read({q, q0, q1, q2}, b, kv);
            Paired known = {at(pair, false), at(pair, true), whole / SIDE};
            for (int64_t first = 0; first < keys - queries + rows.t + rows.tokens; first += AT_ONCE) rows.attend(known, first);
            rows.write(b, kv, heads, queries, out);
        }
        _tile_release();
    }, MANY_PARTS);
}

#endif

}  // namespace
