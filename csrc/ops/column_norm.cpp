// column_norm_ (fps_kernels/ops/reference.py): one read of x, at the speed of memory.
//
// x is cut into row chunks and column panels by its shape alone; every chunk sums into a row of float64 partials, and the
// rows are added in order. Scratch: at most 1 MiB of partials, and per thread 4 KiB or, where columns are not adjacent,
// 68 KiB.
#include "parts/column_sums.h"

namespace {

constexpr int64_t PANEL = 1024;             // columns: the float32 sums of a panel stay in the L1 cache
constexpr int64_t CHUNK_ELEMENTS = 1 << 16; // enough work to be worth a thread's while
constexpr int64_t MAX_CHUNKS = 64;
constexpr int64_t ADDED_AT_ONCE = 128; // columns
constexpr int64_t MAX_PARTIALS = (1 << 20) / sizeof(double);

template <int ORDER, class T>
void sum_chunk(const fps::Matrix& x, int64_t begin, int64_t end, int64_t first, int64_t cols, float* sums, T* tile,
               double* into) {
    const bool inf = ORDER == fps::ORD_INF;
    const T* from = (const T*)x.data + first * x.col_stride;
    memset(sums, 0, PANEL * sizeof(float));
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t stop = least(start + TILE, end);
        if (needs_tiles(cols, x.col_stride)) {
            for_rows(from, x.row_stride, x.col_stride, start, stop, cols, tile,
                     [&](int64_t, const T* row) { add_rows<ORDER, 1>(row, 0, cols, sums); });
        } else {
            int64_t i = start;
            for (; i + 4 <= stop; i += 4) add_rows<ORDER, 4>(from + i * x.row_stride, x.row_stride, cols, sums);
            for (; i < stop; ++i) add_rows<ORDER, 1>(from + i * x.row_stride, 0, cols, sums);
        }
        flush(inf, sums, cols, into);
    }
}

template <int ORDER, class T> int column_norm_of(const fps::Matrix& x, double* acc, int threads) {
    const bool inf = ORDER == fps::ORD_INF;
    const int64_t chunks = most(1, least(least(x.rows * x.cols / CHUNK_ELEMENTS, MAX_CHUNKS), MAX_PARTIALS / x.cols));
    const int64_t chunk_rows = ceil_div(x.rows, chunks), panels = ceil_div(x.cols, PANEL);
    Scratch<double> partials(chunks == 1 ? 0 : chunks * x.cols);
    int failed = !partials;
    if (failed) return fps::OUT_OF_MEMORY;

#pragma omp parallel if (threads > 1 && chunks * panels > 1 && x.rows * x.cols > 2 * WORTH_THREADS)
    {
        Scratch<T> tile(tile_size(least(x.cols, PANEL), x.col_stride));
        if (!tile) {
#pragma omp atomic write
            failed = 1;
        }
        float sums[PANEL];
        // Last rows first: they were written last, so that they may still be in the cache, and the first rows, which what
        // runs next reads first, are left there.
#pragma omp for schedule(dynamic)
        for (int64_t left = chunks * panels; left > 0; --left) {
            const int64_t item = left - 1;
            const int64_t chunk = item / panels, first = item % panels * PANEL, cols = least(PANEL, x.cols - first);
            double* into = acc + first;
            if (chunks > 1) {
                into = partials.data + chunk * x.cols + first;
                memset(into, 0, (size_t)cols * sizeof(double));
            }
            if (tile)
                sum_chunk<ORDER>(x, chunk * chunk_rows, least((chunk + 1) * chunk_rows, x.rows), first, cols, sums,
                                 tile.data, into);
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < ceil_div(x.cols, ADDED_AT_ONCE); ++block) {
            const int64_t first = block * ADDED_AT_ONCE, last = least(first + ADDED_AT_ONCE, x.cols);
            for (int64_t chunk = 0; chunks > 1 && !failed && chunk < chunks; ++chunk)
                for (int64_t j = first; j < last; ++j) combine(inf, partials.data[chunk * x.cols + j], acc + j);
        }
    }
    return failed ? fps::OUT_OF_MEMORY : fps::OK;
}

} // namespace

int fps::FPS_ISA::column_norm(const Matrix& x, double* acc, int64_t order, int threads) {
    return with_dtype(x.dtype, [&](auto element) {
        return with_order(order, [&](auto constant) {
            return column_norm_of<decltype(constant)::value, decltype(element)>(x, acc, threads);
        });
    });
}
