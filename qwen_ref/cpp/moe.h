// The experts of a few tokens, and the router that chooses them.
#pragma once

#include "numbers.h"
#include "packed.h"
#include "plain.h"

namespace {

// `ops.router_topk` of logits (tokens, experts): of equal probabilities the lower index comes first.
void router_topk(const void* logits, int type, int64_t tokens, int64_t experts, int64_t k, int normalize, void* weights,
                 int64_t* chosen) {
    std::vector<float> p((experts + 7) / 8 * 8), kept((k + 7) / 8 * 8);
    for (int64_t t = 0; t < tokens; t++, chosen += k) {
        float most = -INFINITY, mass = 0, part = 0;
        for (int64_t e = 0; e < experts; e++) most = std::max(most, get(logits, t * experts + e, type));
        for (int64_t e = 0; e < experts; e += 8) {
            __m256 v = get8(logits, t * experts + e, type, experts - e);
            _mm256_storeu_ps(&p[e], exp8(_mm256_sub_ps(v, _mm256_set1_ps(most))));
        }
        for (int64_t e = 0; e < experts; e++) mass += p[e];
        for (int64_t i = 0; i < k; i++) {
            chosen[i] = std::max_element(p.begin(), p.begin() + experts) - p.begin();
            kept[i] = p[chosen[i]] / mass;
            part += kept[i];
            p[chosen[i]] = -1;
        }
        for (int64_t i = 0; i < k; i += 8) {
            __m256 w = _mm256_loadu_ps(&kept[i]);
            put8(weights, t * k + i, type, normalize ? _mm256_div_ps(w, _mm256_set1_ps(part)) : w, k - i);
        }
    }
}

// Every expert's matrix of 4- or 8-bit codes, one behind the other.
template <int BITS>
struct PackedStack {
    Matrix first;

    Token ready(const void* x, int64_t from, int type) const {
        return round_token<BITS>(first, static_cast<const uint8_t*>(x) + from * size(type), type);
    }
    float dot(int64_t expert, int64_t row, const Token& token) const {
        Matrix w = first;
        int64_t scales = expert * w.rows * w.groups;
        w.codes += expert * w.rows * w.width;
        w.scale = static_cast<const uint8_t*>(w.scale) + scales * size(w.scale_type);
        if (w.zero) w.zero += scales;
        return multiply_row_of<BITS>(w, row, token);
    }
};

// Every expert's matrix as it is.
template <int TYPE>
struct PlainStack {
    const void* data;
    int64_t rows, columns;

    std::vector<float> ready(const void* x, int64_t from, int type) const { return widened(x, from, type, 1, columns); }
    float dot(int64_t expert, int64_t row, const std::vector<float>& x) const {
        float y;
        dot_row<TYPE, 1>(data, (expert * rows + row) * columns, columns, x.data(), 0, &y);
        return y;
    }
};

// One token, x from `from` on, through its k experts, whose numbers are `chosen`. All their rows of gate_up (2 inner, hidden)
// are one loop, then all rows of down (hidden, inner); every step is rounded, and experts add up in ascending order, as in
// `ops.moe_experts`.
template <int TYPE, typename Up, typename Down>
void experts_of_one(const Up& gate_up, const Down& down, const void* x, int64_t from, int64_t hidden, int64_t inner, int64_t k,
                    const void* weights, const int64_t* chosen, int64_t t, void* out) {
    std::vector<int64_t> order(k);
    for (int64_t i = 0; i < k; i++) order[i] = i;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return chosen[a] < chosen[b]; });
    int64_t gates = (inner + 7) / 8, rows = (hidden + 7) / 8;  // in eights
    std::vector<float> middle(k * gates * 8);
    auto eight = [&](const auto& stack, int64_t expert, int64_t first, int64_t last, const auto& token) {
        alignas(32) float y[8] = {};
        for (int64_t row = first; row < std::min(first + 8, last); row++) y[row - first] = stack.dot(expert, row, token);
        return rounded(_mm256_load_ps(y), TYPE);
    };
    auto token = gate_up.ready(x, from, TYPE);
    share(k * gates, k * inner * hidden, [&](int64_t i, int64_t last) {
        for (; i < last; i++) {
            int64_t expert = chosen[order[i / gates]], first = i % gates * 8;
            __m256 gate = eight(gate_up, expert, first, inner, token), up = eight(gate_up, expert, inner + first, 2 * inner, token);
            _mm256_storeu_ps(&middle[i * 8], rounded(_mm256_mul_ps(rounded(silu8(gate), TYPE), up), TYPE));
        }
    });
    std::vector<decltype(down.ready(x, 0, FLOAT32))> activated;
    for (int64_t i = 0; i < k; i++) activated.push_back(down.ready(&middle[i * gates * 8], 0, FLOAT32));
    share(rows, k * inner * hidden, [&](int64_t i, int64_t last) {
        for (; i < last; i++) {
            __m256 sum = _mm256_setzero_ps();
            for (int64_t j = 0; j < k; j++) {
                __m256 y = eight(down, chosen[order[j]], i * 8, hidden, activated[j]);
                __m256 weighted = _mm256_mul_ps(y, _mm256_set1_ps(get(weights, order[j], TYPE)));
                sum = rounded(_mm256_add_ps(sum, rounded(weighted, TYPE)), TYPE);
            }
            put8(out, t * hidden + i * 8, TYPE, sum, hidden - i * 8);
        }
    });
}

// Tokens one by one; 1 if an expert's number is none: nothing is done then.
template <typename Up, typename Down>
int experts_of_few(const Up& gate_up, const Down& down, const void* x, int type, int64_t tokens, int64_t hidden, int64_t inner,
                   int64_t experts, int64_t k, const void* weights, const int64_t* chosen, void* out) {
    for (int64_t i = 0; i < tokens * k; i++)
        if (chosen[i] < 0 || chosen[i] >= experts) return 1;
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        for (int64_t t = 0; t < tokens; t++)
            experts_of_one<TYPE>(gate_up, down, x, t * hidden, hidden, inner, k,
                static_cast<const uint8_t*>(weights) + t * k * size(TYPE), chosen + t * k, t, out);
    });
    return 0;
}

// `ops.moe_experts` of x (tokens, hidden), gate_up (experts, 2 inner, hidden) and down (experts, hidden, inner), contiguous.
int moe_experts(const void* gate_up, const void* down, const void* x, int type, int64_t tokens, int64_t hidden, int64_t inner,
                int64_t experts, int64_t k, const void* weights, const int64_t* chosen, void* out) {
    int failed = 0;
    with_type(type, [&](auto known) {
        constexpr int TYPE = decltype(known)::value;
        PlainStack<TYPE> upper = {gate_up, 2 * inner, hidden}, lower = {down, hidden, inner};
        failed = experts_of_few(upper, lower, x, TYPE, tokens, hidden, inner, experts, k, weights, chosen, out);
    });
    return failed;
}

// The same of packed stacks; hidden and inner are multiples of what one step reads.
int moe_packed(const uint8_t* up_codes, const void* up_scale, int up_type, const int8_t* up_zero, int64_t up_group, int up_bits,
               const uint8_t* down_codes, const void* down_scale, int down_type, const int8_t* down_zero, int64_t down_group,
               int down_bits, const void* x, int type, int64_t tokens, int64_t hidden, int64_t inner, int64_t experts, int64_t k,
               const void* weights, const int64_t* chosen, void* out) {
    Matrix upper = matrix(up_codes, up_scale, up_type, up_zero, 2 * inner, hidden, up_group, up_bits);
    Matrix lower = matrix(down_codes, down_scale, down_type, down_zero, hidden, inner, down_group, down_bits);
    int failed = 0;
    with_bits(up_bits, [&](auto up) {
        with_bits(down_bits, [&](auto down) {
            failed = experts_of_few(PackedStack<decltype(up)::value>{upper}, PackedStack<decltype(down)::value>{lower}, x, type,
                tokens, hidden, inner, experts, k, weights, chosen, out);
        });
    });
    return failed;
}

}  // namespace
