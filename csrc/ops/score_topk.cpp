// score_topk (fps_kernels/ops/reference.py): one read of W, whatever k.
//
// The keys of a row stay in the cache. While they are computed, each of 32 or 64 groups of columns keeps its maximum. For
// small k the k-th largest of those maxima is a lower bound of the k-th largest key (k different entries reach it), and
// hardly more than k entries reach that bound: the exact choice is made among these. Otherwise the k-th largest key is
// found by halving an interval of keys. Scratch per thread: three rows of 4-byte numbers, and a tile of TILE_ROWS rows
// where the columns of W are not adjacent.
#include "parts/scores.h"

namespace {

constexpr int64_t SMALL_K = 32;
constexpr int64_t AHEAD = 4096; // elements: top-1 needs about 0.1 ns for each, and memory answers after some 100 ns

struct RowScratch {
    int32_t* keys;  // padded(cols)
    int32_t* found; // cols + LANES: columns
    int32_t* work;  // cols + FEW + LANES
};

inline int64_t row_scratch(int64_t cols) { return padded(cols) + cols + LANES + cols + FEW + LANES; }

// Stores the keys of a row, and in `maxima` [GROUPS] those of the columns that share a remainder modulo GROUPS.
template <int GROUPS, class T> void store_keys(const T* w, const float* a, int64_t cols, int32_t* to, int32_t* maxima) {
    constexpr int VECTORS = GROUPS / LANES;
    I highest[VECTORS];
    for (int i = 0; i < VECTORS; ++i) highest[i] = broadcast(-1);
    int64_t j = 0;
    for (; j + GROUPS <= cols; j += GROUPS) {
        for (int i = 0; i < VECTORS; ++i) {
            const I here = keys(load(w + j + i * LANES), load(a + j + i * LANES));
            store_vector(to + j + i * LANES, here);
            highest[i] = max(highest[i], here);
        }
    }
    for (int i = 0; i < VECTORS; ++i) store_vector(maxima + i * LANES, highest[i]);
    for_keys(w + j, a + j, cols - j, [&](int64_t at, I here) {
        store_vector(to + j + at, here);
        store_vector(maxima + at, max(load_ints(maxima + at), here));
    });
}

template <int GROUPS> inline int32_t highest_of(const int32_t* maxima) {
    I best = load_ints(maxima);
    for (int i = LANES; i < GROUPS; i += LANES) best = max(best, load_ints(maxima + i));
    return max_lane(best);
}

// Writes the columns of the k largest keys, ascending, given the k-th largest key.
void emit(const RowScratch& row, int64_t cols, int64_t k, int32_t kth, int32_t* columns) {
    const I threshold = broadcast(kth);
    int64_t above = 0;
    for (int64_t j = 0; j < cols; j += LANES) above += count(gt(load_ints(row.keys + j), threshold));
    int64_t ties = k - above, n = 0;
    for (int64_t j = 0; j < cols; j += LANES) n += take(j, load_ints(row.keys + j), threshold, &ties, row.found + n);
    memcpy(columns, row.found, (size_t)k * sizeof(int32_t));
}

// The columns whose key is at least `bound`, ascending. Memory would idle meanwhile: `next`, the weights of the next row, is
// asked for in the second-level cache.
template <class T> inline int64_t reach(const RowScratch& row, int64_t cols, int32_t bound, const T* next) {
    const I below = broadcast(bound - 1);
    I at = iota();
    int64_t n = 0;
    for (int64_t j = 0; j < cols; j += LANES, at += LANES) {
        __builtin_prefetch(next + j, 0, 2);
        n += compress(row.found + n, gt(load_ints(row.keys + j), below), at);
    }
    return n;
}

// Drops all but k of the n columns found: those outranked by k others, where equal keys rank by column.
template <int SMALL> void keep_best(const RowScratch& row, int64_t n, int64_t k, int32_t* columns) {
    constexpr int VECTORS = SMALL / LANES;
    int32_t found[SMALL];
    I outranked[VECTORS];
    for (int64_t i = 0; i < SMALL; ++i) found[i] = i < n ? row.keys[row.found[i]] : -1;
    for (int i = 0; i < VECTORS; ++i) outranked[i] = broadcast(0);
    for (int64_t at = 0; at < n; ++at) {
        const I one = broadcast(found[at]), place = broadcast((int32_t)at);
        for (int i = 0; i < VECTORS; ++i) {
            const I here = load_ints(found + i * LANES);
            outranked[i] -= (one > here) | ((one == here) & (place < iota() + i * LANES));
        }
    }
    int64_t kept = 0;
    int32_t best[SMALL + LANES];
    for (int i = 0; i < VECTORS; ++i) {
        const Mask real = gt(load_ints(found + i * LANES), broadcast(-1));
        kept += compress(best + kept, gt(broadcast((int32_t)k), outranked[i]) & real, load_ints(row.found + i * LANES));
    }
    memcpy(columns, best, (size_t)k * sizeof(int32_t));
}

// The column of the largest key. Every lane keeps its largest key and where it was first seen; the keys are not stored.
// `ahead` is what will be read soon: it is asked for in the second-level cache.
template <class T> int32_t top1_of_row(const T* w, const float* a, int64_t cols, const T* ahead) {
    constexpr int CHAINS = 4; // independent maxima, so that none waits for the one before
    I best[CHAINS], at[CHAINS], here[CHAINS];
    for (int i = 0; i < CHAINS; ++i) best[i] = broadcast(-1), at[i] = broadcast(0);
    const I lane = iota();
    int64_t j = 0;
    for (; j + CHAINS * LANES <= cols; j += CHAINS * LANES) {
        for (int i = 0; i < CHAINS; ++i) {
            __builtin_prefetch(ahead + j + i * LANES, 0, 2);
            here[i] = keys(load(w + j + i * LANES), load(a + j + i * LANES));
            at[i] = here[i] > best[i] ? lane + broadcast((int32_t)(j + i * LANES)) : at[i];
            best[i] = max(best[i], here[i]);
        }
    }
    for_keys(w + j, a + j, cols - j, [&](int64_t more, I last) {
        at[0] = last > best[0] ? lane + broadcast((int32_t)(j + more)) : at[0];
        best[0] = max(best[0], last);
    });
    I highest = best[0];
    for (int i = 1; i < CHAINS; ++i) highest = max(highest, best[i]);
    highest = broadcast(max_lane(highest));
    int32_t column = INT32_MAX;
    for (int i = 0; i < CHAINS; ++i)
        for (Mask m = eq(best[i], highest); m; m &= m - 1) column = (int32_t)least(column, at[i][__builtin_ctz(m)]);
    return column;
}

template <int GROUPS, class T>
void topk_of_row(const T* w, const float* a, int64_t cols, int64_t k, const RowScratch& row, int32_t* columns) {
    int32_t maxima[GROUPS];
    store_keys<GROUPS>(w, a, cols, row.keys, maxima);
    if (k <= SMALL_K) {
        const int32_t bound = kth_of_few<GROUPS>(maxima, GROUPS, k);
        const int64_t n = reach(row, cols, bound < 0 ? 0 : bound, w + cols); // 0 also leaves out the lanes beyond the row
        if (n == k) {
            memcpy(columns, row.found, (size_t)k * sizeof(int32_t));
        } else if (n <= 16) {
            keep_best<16>(row, n, k, columns);
        } else if (n <= 32) {
            keep_best<32>(row, n, k, columns);
        } else if (n <= FEW) {
            keep_best<FEW>(row, n, k, columns);
        } else { // many equal keys, or a row that is ordered in a way that defeats the groups
            emit(row, cols, k, kth_of_many(row.keys, cols, k, bound < 0 ? 0 : bound, highest_of<GROUPS>(maxima), row.work),
                 columns);
        }
    } else if (k == cols) {
        for (int64_t j = 0; j < cols; ++j) columns[j] = (int32_t)j;
    } else {
        emit(row, cols, k, kth_of_many(row.keys, cols, k, 0, highest_of<GROUPS>(maxima), row.work), columns);
    }
}

template <class T> int score_topk_of(const fps::Matrix& w, int64_t k, int32_t* columns, int threads) {
    const int64_t chunk_rows = most(TILE_ROWS, least(1024, (1 << 16) / w.cols));
    const int64_t chunks = ceil_div(w.rows, chunk_rows);
    int failed = 0;
#pragma omp parallel if (threads > 1 && w.rows * w.cols > WORTH_THREADS)
    {
        Scratch<T> tile(tile_size(w.cols, w.col_stride));
        Scratch<int32_t> memory(row_scratch(w.cols));
        const bool ready = tile && memory;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
        RowScratch row = {memory.data, nullptr, nullptr};
        row.found = row.keys + padded(w.cols);
        row.work = row.found + w.cols + LANES;
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            if (!ready) continue;
            const int64_t begin = chunk * chunk_rows, end = least(begin + chunk_rows, w.rows);
            for_rows((const T*)w.data, w.row_stride, w.col_stride, begin, end, w.cols, tile.data,
                     [&](int64_t i, const T* elements) {
                         const float* a = factors_of_row(w, i);
                         if (k == 1)
                             columns[i] = top1_of_row(elements, a, w.cols, elements + AHEAD);
                         else if (k <= 8)
                             topk_of_row<32>(elements, a, w.cols, k, row, columns + i * k);
                         else
                             topk_of_row<64>(elements, a, w.cols, k, row, columns + i * k);
                     });
        }
    }
    return failed ? fps::OUT_OF_MEMORY : fps::OK;
}

} // namespace

int fps::FPS_ISA::score_topk(const Matrix& w, int64_t k, int32_t* columns, int threads) {
    return with_dtype(w.dtype, [&](auto element) { return score_topk_of<decltype(element)>(w, k, columns, threads); });
}
