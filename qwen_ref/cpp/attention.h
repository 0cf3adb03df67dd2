// Attention, a kv head's keys and values read once for all the queries that share it.
#pragma once

#include "numbers.h"

namespace {

constexpr int64_t KEYS = 32;     // keys and values in fp32 at a time
constexpr int64_t QUERIES = 32;  // rows of queries that share them, if one kv head has no more
constexpr int64_t SPAN = 512;    // keys read together, and joined with others: a token's can be shared by threads

int64_t padded(int64_t dim) { return (dim + Floats::N - 1) / Floats::N * Floats::N; }  // numbers of a row, zeros at its end

// (R, KEYS) = queries (R, wide) keys (KEYS, wide)^T.
template <int R>
void scores_of(const float* q, const float* k, int64_t wide, float* scores) {
    for (int64_t s = 0; s < KEYS; s += 4) {
        Floats sum[R][4];
        for (int64_t d = 0; d < wide; d += Floats::N) {
            Floats query[R];
            for (int r = 0; r < R; r++) query[r] = Floats::at(q + r * wide + d);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                Floats key = Floats::at(k + (s + i) * wide + d);
                for (int r = 0; r < R; r++) sum[r][i].add_product(query[r], key);
            }
        }
        for (int r = 0; r < R; r++) {
            __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sum[r][0].eight(), sum[r][1].eight()),
                                          _mm256_hadd_ps(sum[r][2].eight(), sum[r][3].eight()));
            __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
            _mm_storeu_ps(scores + r * KEYS + s, four);
        }
    }
}

// The same for any even number of rows, as many at a time as there are registers for.
void scores_of(const float* q, const float* k, int64_t rows, int64_t wide, float* scores) {
    constexpr int64_t MORE = Floats::N / 4;  // 4 of AVX-512's 32 registers, else 2 of 16
    int64_t r = 0;
    for (; r + MORE <= rows; r += MORE) scores_of<MORE>(q + r * wide, k, wide, scores + r * KEYS);
    for (; r < rows; r += 2) scores_of<2>(q + r * wide, k, wide, scores + r * KEYS);
}

// out (rows, wide) += p (rows, KEYS) v (KEYS, wide), V registers of columns of two rows.
template <int V>
void weigh(const float* p, const float* v, int64_t wide, float* out) {
    constexpr int64_t N = Floats::N;
    Floats sum[2][V];
    for (int i = 0; i < V; i++) sum[0][i] = Floats::at(out + N * i), sum[1][i] = Floats::at(out + wide + N * i);
    for (int64_t s = 0; s < KEYS; s++) {
        Floats one = Floats::of(p[s]), two = Floats::of(p[KEYS + s]);
#pragma GCC unroll 4
        for (int i = 0; i < V; i++) {
            Floats value = Floats::at(v + s * wide + N * i);
            sum[0][i].add_product(one, value), sum[1][i].add_product(two, value);
        }
    }
    for (int i = 0; i < V; i++) sum[0][i].put(out + N * i), sum[1][i].put(out + wide + N * i);
}

struct Heads {
    const void* data;
    int64_t batch, head, token;  // strides, in numbers

    Heads after(int64_t tokens, int type) const {
        return {static_cast<const uint8_t*>(data) + tokens * token * size(type), batch, head, token};
    }
};

// What queries have read so far, a row for every (token, head): softmax's weights are exp(score - most), their sum `mass`, and
// that of the values they weigh `sum`.
struct Reading {
    float *sum, *most, *mass;  // (rows, wide), (rows), (rows)
    int64_t rows, wide;

    static int64_t room(int64_t rows, int64_t dim) { return rows * (padded(dim) + 2); }
    static Reading at(float* memory, int64_t rows, int64_t dim) {
        int64_t wide = padded(dim);
        return {memory, memory + rows * wide, memory + rows * (wide + 1), rows, wide};
    }

    void clear() const { std::fill(sum, most, 0.f), std::fill(most, mass, -INFINITY), std::fill(mass, mass + rows, 0.f); }

    // As if everything that `other` has read had been read here.
    void add(const Reading& other) const {
        for (int64_t r = 0; r < rows; r++) {
            float top = std::max(most[r], other.most[r]);
            if (top == -INFINITY) continue;  // neither has seen anything
            float here = std::exp(most[r] - top), there = std::exp(other.most[r] - top);
            most[r] = top, mass[r] = mass[r] * here + other.mass[r] * there;
            for (int64_t d = r * wide; d < (r + 1) * wide; d += 8) {
                __m256 both = _mm256_mul_ps(_mm256_loadu_ps(sum + d), _mm256_set1_ps(here));
                _mm256_storeu_ps(sum + d, _mm256_fmadd_ps(_mm256_loadu_ps(other.sum + d), _mm256_set1_ps(there), both));
            }
        }
    }

    void put(int64_t row, void* out, int64_t to, int64_t dim, int type) const {
        for (int64_t d = 0; d < dim; d += 8)
            put8(out, to + d, type, _mm256_div_ps(_mm256_loadu_ps(sum + row * wide + d), _mm256_set1_ps(mass[row])));
    }
};

// A row of scores, of which the first `seen` count, to softmax's weights of what has the largest score, `most`; both grow with
// every call. What was summed before is to be multiplied by what is returned (Milakov and Gimelshein 2018, arXiv 1805.02867).
float soften(float* row, int64_t seen, int64_t count, float& most, float& mass) {
    std::fill(row + seen, row + count, -INFINITY);
    float before = most, lanes[8];
    __m256 largest = _mm256_set1_ps(most);
    for (int64_t s = 0; s < count; s += 8) largest = _mm256_max_ps(_mm256_loadu_ps(row + s), largest);  // which a NaN leaves
    _mm256_storeu_ps(lanes, largest);
    most = *std::max_element(lanes, lanes + 8);
    if (most == -INFINITY) {  // nothing seen yet, or only scores of minus infinity
        std::fill(row, row + count, 0.f);
        return 1;
    }
    __m256 top = _mm256_set1_ps(most), part = _mm256_setzero_ps();
    for (int64_t s = 0; s < count; s += 8) {
        __m256 value = _mm256_loadu_ps(row + s), p = exp8(_mm256_sub_ps(value, top));
        p = _mm256_andnot_ps(_mm256_cmp_ps(value, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ), p);
        _mm256_storeu_ps(row + s, p);
        part = _mm256_add_ps(part, p);
    }
    float kept = before == most ? 1 : std::exp(before - most);
    mass = mass * kept + total(part);
    return kept;
}

int64_t even(int64_t rows) { return (rows + 1) / 2 * 2; }  // as the products above take them

// Numbers that `attend` needs beside what it has read.
int64_t beside(int64_t rows, int64_t dim) { return even(rows) * (padded(dim) + KEYS) + KEYS * padded(dim); }

// Queries t .. t + tokens of the heads that share one kv head, over the first SPAN of the keys they see, KEYS at a time.
template <int TYPE>
void attend(const Heads& q, const Heads& k, const Heads& v, int64_t b, int64_t kv, int64_t shared, int64_t t, int64_t tokens,
            int64_t past, int64_t dim, float* memory, const Reading& reading) {
    auto [sum, most, mass, even, wide] = reading;
    int64_t rows = shared * tokens;  // row: (token, head)
    float *query = memory, *block = query + even * wide, *scores = block + KEYS * wide;
    const __m256 root = _mm256_set1_ps(1 / std::sqrt(float(dim)));
    std::fill(query, wide == dim ? block : scores, 0.f);
    reading.clear();
    for (int64_t r = 0; r < rows; r++) {
        int64_t from = b * q.batch + (kv * shared + r % shared) * q.head + (t + r / shared) * q.token;
        for (int64_t d = 0; d < dim; d += 8)
            _mm256_storeu_ps(query + r * wide + d, _mm256_mul_ps(get8(q.data, from + d, TYPE), root));
    }
    int64_t end = std::min(past + t + tokens, SPAN);
    auto widen_block = [&](const Heads& x, int64_t first) {
        for (int64_t s = 0; s < KEYS; s++) {
            int64_t from = b * x.batch + kv * x.head + (first + s) * x.token;
            for (int64_t d = 0; d < dim; d += 8)
                _mm256_storeu_ps(block + s * wide + d, first + s < end ? get8(x.data, from + d, TYPE) : _mm256_setzero_ps());
        }
    };
    for (int64_t first = 0; first < end; first += KEYS) {
        widen_block(k, first);
        scores_of(query, block, even, wide, scores);
        for (int64_t r = 0; r < even; r++) {
            int64_t seen = std::max<int64_t>(std::min(past + t + std::min(r / shared, tokens - 1) + 1 - first, KEYS), 0);
            float kept = soften(scores + r * KEYS, seen, KEYS, most[r], mass[r]);
            for (int64_t d = r * wide; kept != 1 && d < (r + 1) * wide; d += 8)
                _mm256_storeu_ps(sum + d, _mm256_mul_ps(_mm256_loadu_ps(sum + d), _mm256_set1_ps(kept)));
        }
        widen_block(v, first);
        for (int64_t r = 0; r < even; r += 2) {
            int64_t d = 0;
            float *p = scores + r * KEYS, *to = sum + r * wide;
            for (; d + 4 * Floats::N <= wide; d += 4 * Floats::N) weigh<4>(p, block + d, wide, to + d);
            for (; d < wide; d += Floats::N) weigh<1>(p, block + d, wide, to + d);
        }
    }
}

// `ops.attention` without a mask: q (batch, heads, queries, dim), k and v (batch, kv_heads, keys, dim), last axes contiguous,
// dim a multiple of eight. Everything is fp32 until the result is rounded: (batch, queries, heads, dim), as `o_proj` reads it.
// To the bit what `attention_decode` gives for each query alone.
void attention(const void* q, const void* k, const void* v, int type, int64_t batch, int64_t heads,
                          int64_t kv_heads, int64_t queries, int64_t keys, int64_t dim, int64_t q0, int64_t q1, int64_t q2,
                          int64_t k0, int64_t k1, int64_t k2, int64_t v0, int64_t v1, int64_t v2, void* out) {
    Heads qh = {q, q0, q1, q2}, kh = {k, k0, k1, k2}, vh = {v, v0, v1, v2};
    int64_t shared = heads / kv_heads, tokens = std::min(queries, std::max<int64_t>(QUERIES / shared, 1));
    int64_t tiles = (queries + tokens - 1) / tokens;
    with_type(type, [&](auto known) {
        share(batch * kv_heads * tiles, batch * heads * queries * keys * dim, [&](int64_t i, int64_t last) {
            int64_t room = Reading::room(even(shared * tokens), dim);
            Aligned<float> memory(beside(shared * tokens, dim)), read(2 * room);
            for (; i < last; i++) {
                int64_t b = i / tiles / kv_heads, kv = i / tiles % kv_heads;
                int64_t t = (tiles - 1 - i % tiles) * tokens, count = std::min(tokens, queries - t);  // the longest first
                Reading reading = Reading::at(read.get(), even(shared * count), dim);
                Reading further = Reading::at(read.get() + room, even(shared * count), dim);
                for (int64_t past = keys - queries, from = 0; from < past + t + count; from += SPAN) {
                    attend<decltype(known)::value>(qh, kh.after(from, type), vh.after(from, type), b, kv, shared, t, count,
                                                   past - from, dim, memory.get(), from ? further : reading);
                    if (from) reading.add(further);
                }
                for (int64_t r = 0; r < shared * count; r++)
                    reading.put(r, out, ((b * queries + t + r / shared) * heads + kv * shared + r % shared) * dim, dim, type);
            }
        }, MANY_PARTS);
    });
}

// `ops.attention_decode`: q (batch, heads, dim) and as many keys of each sequence as `lengths` says, the last `window` of them
// (0: all), of k and v (batch, kv_heads, room, dim). SPAN keys are a part of the loop, whose results are then joined in order.
void attention_decode(const void* q, const void* k, const void* v, const int32_t* lengths, int type, int64_t batch,
                      int64_t heads, int64_t kv_heads, int64_t room, int64_t dim, int64_t window, int64_t q0, int64_t q1,
                      int64_t k0, int64_t k1, int64_t k2, int64_t v0, int64_t v1, int64_t v2, void* out) {
    auto held = [&](int64_t b) { return std::max<int64_t>(std::min<int64_t>(lengths[b], room), 0); };
    auto seen = [&](int64_t b) { return window ? std::min(held(b), window) : held(b); };
    int64_t shared = heads / kv_heads, rows = even(shared), most = 0;
    for (int64_t b = 0; b < batch; b++) most = std::max(most, seen(b));
    int64_t spans = (most + SPAN - 1) / SPAN, each = Reading::room(rows, dim);
    std::vector<float> read(batch * kv_heads * spans * each);
    auto reading = [&](int64_t i) { return Reading::at(&read[i * each], rows, dim); };
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        share(batch * kv_heads * spans, batch * heads * most * dim, [&](int64_t i, int64_t last) {
            Aligned<float> memory(beside(shared, dim));
            for (; i < last; i++) {
                int64_t b = i / spans / kv_heads, kv = i / spans % kv_heads, from = i % spans * SPAN;
                int64_t count = std::min(seen(b) - from, SPAN), first = held(b) - seen(b) + from;
                if (count <= 0) continue;
                Heads kh = Heads{k, k0, k1, k2}.after(first, TYPE), vh = Heads{v, v0, v1, v2}.after(first, TYPE);
                attend<TYPE>({q, q0, q1, 0}, kh, vh, b, kv, shared, 0, 1, count - 1, dim, memory.get(), reading(i));
            }
        }, MANY_PARTS);
    });
    for (int64_t i = 0; i < batch * kv_heads; i++) {
        int64_t used = (seen(i / kv_heads) + SPAN - 1) / SPAN;
        for (int64_t span = 1; span < used; span++) reading(i * spans).add(reading(i * spans + span));
        for (int64_t r = 0; r < shared; r++)
            if (used) reading(i * spans).put(r, out, (i * shared + r) * dim, dim, type);
            else std::memset(static_cast<uint8_t*>(out) + (i * shared + r) * dim * size(type), 0, dim * size(type));
    }
}

}  // namespace
