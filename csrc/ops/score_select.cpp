// score_select (fps_kernels/ops/reference.py): two reads of W, the second mostly from the cache.
//
// The first counts what each block of rows chooses, prefix sums say where that goes, the second writes it.
#include "parts/scores.h"

namespace {

using fps::Matrix;

constexpr int64_t BLOCK_ENTRIES = 1 << 16; // of a block of rows, if its rows are not longer

// Chooses the entries of the rows [begin, end) in order and hands each row's columns on: `fn(row, columns, n)`.
template <class T, class Fn>
void choose(const Matrix& w, int64_t begin, int64_t end, I threshold, int64_t ties, T* tile, int32_t* found, Fn fn) {
    for_rows((const T*)w.data, w.row_stride, w.col_stride, begin, end, w.cols, tile, [&](int64_t i, const T* row) {
        int64_t n = 0;
        for_keys(row, factors_of_row(w, i), w.cols,
                 [&](int64_t j, I here) { n += take(j, here, threshold, &ties, found + n); });
        fn(i, found, n);
    });
}

struct Block { // a block of rows: what it chooses, and where that begins
    int64_t greater, equal, at, ties;
};

template <class T>
int score_select_of(const Matrix& w, int32_t threshold_key, int64_t nnz, int32_t* row_offsets, int32_t* columns,
                    int threads) {
    const I threshold = broadcast(threshold_key);
    const int64_t block_rows = most(TILE_ROWS, least(1024, BLOCK_ENTRIES / w.cols)), n_blocks = ceil_div(w.rows, block_rows);
    Scratch<Block> blocks(n_blocks);
    if (!blocks) return fps::OUT_OF_MEMORY;
    int failed = 0, wrong = 0;
#pragma omp parallel if (threads > 1 && w.rows * w.cols > WORTH_THREADS)
    {
        Scratch<T> tile(tile_size(w.cols, w.col_stride));
        Scratch<int32_t> found(w.cols + LANES);
        const bool ready = tile && found;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < n_blocks; ++b) {
            if (!ready) continue;
            int64_t greater = 0, equal = 0;
            for_rows((const T*)w.data, w.row_stride, w.col_stride, b * block_rows, least((b + 1) * block_rows, w.rows),
                     w.cols, tile.data, [&](int64_t i, const T* row) {
                         for_keys(row, factors_of_row(w, i), w.cols, [&](int64_t, I here) {
                             greater += count(gt(here, threshold));
                             equal += count(eq(here, threshold));
                         });
                     });
            blocks.data[b] = {greater, equal, 0, 0};
        }
#pragma omp single
        {
            int64_t at = 0, left = nnz; // of those equal to the threshold, what those above it leave
            for (int64_t b = 0; !failed && b < n_blocks; ++b) left -= blocks.data[b].greater;
            wrong = failed || left < 0;
            for (int64_t b = 0; !wrong && b < n_blocks; ++b) {
                Block& block = blocks.data[b];
                block.at = at;
                block.ties = least(left, block.equal);
                left -= block.ties;
                at += block.greater + block.ties;
            }
            wrong = wrong || at != nnz;
            row_offsets[0] = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < n_blocks; ++b) {
            if (wrong) continue;
            const Block& block = blocks.data[b];
            int64_t at = block.at;
            const int64_t end = at + block.greater + block.ties; // W may change under us, the bounds must hold even then
            choose(w, b * block_rows, least((b + 1) * block_rows, w.rows), threshold, block.ties, tile.data, found.data,
                   [&](int64_t i, const int32_t* from, int64_t n) {
                       n = least(n, end - at);
                       if (n > 0) memcpy(columns + at, from, (size_t)n * sizeof(int32_t));
                       at += n;
                       row_offsets[i + 1] = (int32_t)at;
                   });
        }
    }
    return failed ? fps::OUT_OF_MEMORY : wrong ? fps::WRONG_COUNT : fps::OK;
}

} // namespace

int fps::FPS_ISA::score_select(const Matrix& w, float threshold, int64_t nnz, int32_t* row_offsets, int32_t* columns,
                               int threads) {
    // Scores are not negative: every one of them lies above a negative threshold.
    const int32_t threshold_key = threshold < 0 ? -1 : key(threshold, 1.0f);
    return with_dtype(w.dtype, [&](auto element) {
        return score_select_of<decltype(element)>(w, threshold_key, nnz, row_offsets, columns, threads);
    });
}
