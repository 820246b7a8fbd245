// Rows of a strided matrix as contiguous rows, and scratch memory.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "parts/simd.h"

namespace {

// Uninitialised scratch, freed at the end of the block. Exceptions must not cross the ABI, so none are thrown: test it.
template <class T> struct Scratch {
    T* data;
    explicit Scratch(int64_t n) : data((T*)malloc((size_t)(n > 0 ? n : 1) * sizeof(T))) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    explicit operator bool() const { return data != nullptr; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t magnitude(int64_t a) { return a < 0 ? -a : a; }

// Below this many elements a kernel runs some ten microseconds, and waking other threads may take as long.
constexpr int64_t WORTH_THREADS = 1 << 17;

// n rounded up to whole vectors.
inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Rows that are copied together where columns are not adjacent in memory: a cache line of the transposed matrix.
constexpr int64_t TILE_ROWS = 16;

inline bool needs_tiles(int64_t cols, int64_t col_stride) { return col_stride != 1 && cols > 1; }

// The padding keeps the rows of a tile out of each other's cache sets where `cols` is a power of two.
inline int64_t tile_pitch(int64_t cols) { return cols + 16; }

// Scratch elements that for_rows needs.
inline int64_t tile_size(int64_t cols, int64_t col_stride) {
    return needs_tiles(cols, col_stride) ? TILE_ROWS * tile_pitch(cols) : 0;
}

template <int BYTES> struct Quad; // four elements of that size
template <> struct Quad<4> {
    typedef uint32_t type __attribute__((vector_size(16)));
};
template <> struct Quad<2> {
    typedef uint16_t type __attribute__((vector_size(8)));
};

// Transposes 4 columns of TILE_ROWS adjacent elements, each `col_stride` from the last, into the rows of a tile.
template <class T> inline void transpose_columns(const T* from, int64_t col_stride, T* to, int64_t pitch) {
    typedef typename Quad<sizeof(T)>::type V;
    for (int64_t r = 0; r < TILE_ROWS; r += 4) {
        const V a = load_vector<V>(from + r), b = load_vector<V>(from + r + col_stride);
        const V c = load_vector<V>(from + r + 2 * col_stride), d = load_vector<V>(from + r + 3 * col_stride);
        const V ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        const V cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
        store_vector(to + r * pitch, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
        store_vector(to + (r + 1) * pitch, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
        store_vector(to + (r + 2) * pitch, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
        store_vector(to + (r + 3) * pitch, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
    }
}

template <class T>
void copy_tile(const T* from, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, T* to, int64_t pitch) {
    if (magnitude(col_stride) <= magnitude(row_stride)) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < cols; ++c) to[r * pitch + c] = from[r * row_stride + c * col_stride];
        return;
    }
    int64_t c = 0;
    for (; row_stride == 1 && rows == TILE_ROWS && c + 4 <= cols; c += 4) {
        // Every column is a cache line far from the last: ask for it in good time.
        for (int64_t i = 0; i < 4; ++i) __builtin_prefetch(from + (c + 32 + i) * col_stride, 0, 2);
        transpose_columns(from + c * col_stride, col_stride, to + c, pitch);
    }
    for (; c < cols; ++c)
        for (int64_t r = 0; r < rows; ++r) to[r * pitch + c] = from[r * row_stride + c * col_stride];
}

// Calls `fn(row, elements)` for the rows [begin, end) of a matrix at `from`, in order, each as `cols` adjacent elements:
// in place where they are adjacent, otherwise copied to `tile` TILE_ROWS rows at a time.
template <class T, class Fn>
void for_rows(const T* from, int64_t row_stride, int64_t col_stride, int64_t begin, int64_t end, int64_t cols, T* tile,
              Fn fn) {
    if (!needs_tiles(cols, col_stride)) {
        for (int64_t i = begin; i < end; ++i) fn(i, from + i * row_stride);
        return;
    }
    const int64_t pitch = tile_pitch(cols);
    for (int64_t start = begin; start < end; start += TILE_ROWS) {
        const int64_t rows = least(TILE_ROWS, end - start);
        copy_tile(from + start * row_stride, row_stride, col_stride, rows, cols, tile, pitch);
        for (int64_t r = 0; r < rows; ++r) fn(start + r, tile + r * pitch);
    }
}

} // namespace
