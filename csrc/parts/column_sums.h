// Adding rows into per-column accumulators: what both column norms are made of.
//
// A tile of at most 128 rows is added in row order in float32 and then carried into float64, which keeps the relative
// error of a sum below 128 * 2^-24 < 1e-5. The order per column is the same whatever the vector width, so that every
// instruction set gives the same bits. Maxima are taken on the bits of |x|, in which NaN ranks above infinity.
#pragma once

#include "parts/rows.h"

namespace {

constexpr int64_t TILE = 128;

template <int ORDER> inline F accumulate(F acc, F x) {
    if (ORDER == fps::ORD_1) return acc + absolute(x);
    if (ORDER == fps::ORD_2) return acc + x * x;
    return (F)max((I)acc, (I)absolute(x));
}

// sums[j] += |x_mj|^p over ROWS rows, in row order; `sums` is readable and writable up to a multiple of LANES.
template <int ORDER, int ROWS, class T> inline void add_rows(const T* x, int64_t row_stride, int64_t cols, float* sums) {
    int64_t j = 0;
    for (; j + LANES <= cols; j += LANES) {
        // Asked for in the second-level cache, which can wait for more lines from memory than the first.
        if (ROWS > 1)
            for (int r = 0; r < ROWS; ++r) __builtin_prefetch(x + (r + 2 * ROWS) * row_stride + j, 0, 2);
        F acc = load(sums + j);
        for (int r = 0; r < ROWS; ++r) acc = accumulate<ORDER>(acc, load(x + r * row_stride + j));
        store_vector(sums + j, acc);
    }
    if (j < cols) {
        F acc = load(sums + j);
        for (int r = 0; r < ROWS; ++r) acc = accumulate<ORDER>(acc, load_first(x + r * row_stride + j, cols - j));
        store_vector(sums + j, acc);
    }
}

inline void combine(bool inf, double value, double* into) {
    if (!inf)
        *into += value;
    else if (value > *into || value != value)
        *into = value;
}

// Carries a tile into `into` and clears it.
inline void flush(bool inf, float* tile, int64_t cols, double* into) {
    if (inf) {
        for (int64_t j = 0; j < cols; ++j) combine(true, tile[j], into + j);
    } else {
        for (int64_t j = 0; j < cols; ++j) into[j] += tile[j];
    }
    memset(tile, 0, (size_t)cols * sizeof(float));
}

// Calls `fn` with the order as a compile-time constant: an object whose `value` it is.
template <int ORDER> struct OrderConstant {
    static constexpr int value = ORDER;
};
template <class Fn> inline int with_order(int64_t order, Fn fn) {
    if (order == fps::ORD_1) return fn(OrderConstant<fps::ORD_1>());
    if (order == fps::ORD_2) return fn(OrderConstant<fps::ORD_2>());
    return fn(OrderConstant<fps::ORD_INF>());
}

} // namespace
