// What a model does most on a CPU with AVX2, under one entry: `run` makes a list of calls, one or a whole token's.
#include "attention.h"
#include "delta.h"
#include "moe.h"
#include "numbers.h"
#include "packed.h"
#include "plain.h"
#include "repack.h"
#include "rows.h"
#include "stored.h"
#include "tiled_attention.h"
#include "tiles.h"

namespace {

// An argument as Python hands it over: an address, a whole number, or the bits of a double.
template <typename T>
T argument(int64_t cell) {
    if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(cell);
    if constexpr (std::is_integral_v<T>) return T(cell);
    double number;
    std::memcpy(&number, &cell, sizeof number);
    if constexpr (std::is_floating_point_v<T>) return T(number);
}

template <typename R, typename... A, size_t... I>
int call(R (*operation)(A...), const int64_t* cells, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<R>) return operation(argument<A>(cells[I])...), 0;
    else return operation(argument<A>(cells[I])...);
}

// The operation called with its arguments, if they are as many as it has.
template <typename R, typename... A>
int call(R (*operation)(A...), const int64_t* cells, int64_t count) {
    if (count != sizeof...(A)) return -1;
    return call(operation, cells, std::index_sequence_for<A...>());
}

#define OPERATION(name) {#name, [](const int64_t* cells, int64_t count) { return call(name, cells, count); }}

const struct {
    const char* name;
    int (*call)(const int64_t*, int64_t);
} OPERATIONS[] = {
    OPERATION(linear),        OPERATION(linear_packed),  OPERATION(linear_stored),    OPERATION(rows_of_stored),
    OPERATION(attention),     OPERATION(attention_decode), OPERATION(rms_norm),       OPERATION(add_rms_norm),
    OPERATION(rope),          OPERATION(norm_rope_write), OPERATION(swiglu),          OPERATION(sigmoid_gate),
    OPERATION(router_topk),   OPERATION(moe_experts),    OPERATION(moe_packed),       OPERATION(zero_centred_rms_norm),
    OPERATION(causal_conv1d), OPERATION(gated_delta_rule), OPERATION(gated_delta_step), OPERATION(gated_rms_norm),
    OPERATION(take_columns),  OPERATION(copy),           OPERATION(repack_awq),       OPERATION(repack_gptq),
    OPERATION(repack_halves), OPERATION(repack_zeros),
#ifdef __AMX_BF16__
    OPERATION(linear_tiles),  OPERATION(attention_tiles),
#endif
};

}  // namespace

// The number by which `run` knows an operation; -1 if there is none of this name.
extern "C" int64_t find(const char* name) {
    for (int64_t i = 0; i < int64_t(sizeof OPERATIONS / sizeof *OPERATIONS); i++)
        if (!std::strcmp(OPERATIONS[i].name, name)) return i;
    return -1;
}

// Whether there is a matrix unit, and so `linear_tiles` and `attention_tiles`.
extern "C" int has_tiles() { return tiles_granted(); }

// Calls, one after the other: an operation's number, how many arguments follow, and these. Returns 0, or what the first call
// that failed returned, and makes none after it.
extern "C" int run(const int64_t* cells, int64_t length) {
    int failed = 0;
    auto all = [&] {
        for (const int64_t* end = cells + length; cells < end && !failed; cells += 2 + cells[1])
            failed = OPERATIONS[cells[0]].call(cells + 2, cells[1]);
    };
    if (length > 2 + cells[1]) together(all);
    else all();
    return failed;
}
