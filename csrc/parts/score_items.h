// The entries of many tensors in work items of about equal size, whose keys are counted.
#pragma once
#include "scores.h"

namespace {

using fps::Matrix;

constexpr int64_t ITEM = 1 << 16; // entries of one work item

struct Item { // a block of one tensor
    int64_t tensor, row, rows, col, cols;
    int64_t greater, inside; // counts of the last pass
    int64_t pool_at;         // where its keys inside the interval lie, where they were collected
};

// Where columns are not adjacent an item is narrow, so that it still has whole tiles of rows.
int64_t item_cols(const Matrix& w) { return least(w.cols, needs_tiles(w.cols, w.col_stride) ? 2048 : ITEM); }
int64_t item_rows(const Matrix& w) { return most(1, ITEM / most(1, item_cols(w))); }

int64_t count_items(const Matrix& w) {
    return w.rows * w.cols == 0 ? 0 : ceil_div(w.cols, item_cols(w)) * ceil_div(w.rows, item_rows(w));
}

void list_items(const Matrix* weights, int64_t n, Item* to) {
    for (int64_t t = 0; t < n; ++t) {
        const Matrix& w = weights[t];
        if (w.rows * w.cols == 0) continue;
        const int64_t rows = item_rows(w), cols = item_cols(w);
        for (int64_t row = 0; row < w.rows; row += rows)
            for (int64_t col = 0; col < w.cols; col += cols)
                *to++ = {t, row, least(rows, w.rows - row), col, least(cols, w.cols - col), 0, 0, 0};
    }
}

// Calls `fn(keys)` for every vector of keys of an item. `tile` holds 4-byte elements, enough for every dtype.
template <class Fn> void for_item(const Matrix* weights, const Item& item, uint32_t* tile, Fn fn) {
    const Matrix& w = weights[item.tensor];
    with_dtype(w.dtype, [&](auto element) {
        typedef decltype(element) T;
        const T* from = (const T*)w.data + item.col * w.col_stride;
        for_rows(from, w.row_stride, w.col_stride, item.row, item.row + item.rows, item.cols, (T*)tile,
                 [&](int64_t i, const T* row) {
                     for_keys(row, factors_of_row(w, i) + item.col, item.cols, [&](int64_t, I here) { fn(here); });
                 });
        return 0;
    });
}

int64_t largest_tile(const Matrix* weights, int64_t n) {
    int64_t size = 0;
    for (int64_t t = 0; t < n; ++t) size = most(size, tile_size(item_cols(weights[t]), weights[t].col_stride));
    return size;
}

} // namespace
