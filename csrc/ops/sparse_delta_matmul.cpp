// sparse_delta_matmul_ (fps_kernels/ops/reference.py): y += x D^T, one read of x and one pass over y.
//
// A tile of rows of x is laid down transposed, those groups of columns of it that carry an entry, so that an entry is one
// number times a run. Sixteen outputs of the tile are added up as runs, and transposed into y.
//
// Scratch per thread: 256 bytes per column that carries an entry, and 4 KiB.
#include "parts/planes.h"

namespace {

using fps::Matrix;
using fps::SparseDelta;

constexpr int64_t ROWS = 64; // of a tile
constexpr int64_t VECTORS = ROWS / LANES;

struct Slots { // where groups of TILE_COLS columns lie that carry entries; -1 for the others
    int64_t* of_group;
    int64_t count;
};

void find_slots(const SparseDelta& d, int64_t outputs, int64_t groups, Slots* slots) {
    for (int64_t g = 0; g < groups; ++g) slots->of_group[g] = -1;
    for (int32_t e = d.row_offsets[0]; e < d.row_offsets[outputs]; ++e) slots->of_group[d.columns[e] / TILE_COLS] = 0;
    slots->count = 0;
    for (int64_t g = 0; g < groups; ++g)
        if (slots->of_group[g] == 0) slots->of_group[g] = slots->count++;
}

template <class T> void lay_columns(const Matrix& x, int64_t row, int64_t rows, const Slots& slots, float* planes) {
    const int64_t groups = ceil_div(x.cols, TILE_COLS);
    for (int64_t g = 0; g < groups; ++g) {
        if (slots.of_group[g] < 0) continue;
        float* const plane = planes + slots.of_group[g] * TILE_COLS * ROWS;
        const int64_t cols = least(TILE_COLS, x.cols - g * TILE_COLS);
        const T* from = (const T*)x.data + row * x.row_stride + g * TILE_COLS * x.col_stride;
        float* to[TILE_COLS];
        for (int64_t c = 0; c < TILE_COLS; ++c) to[c] = plane + c * ROWS;
        if (x.col_stride == 1)
            transpose_runs(from, x.row_stride, rows, cols, to);
        else
            for (int64_t c = 0; c < cols; ++c) copy_run(from + c * x.col_stride, x.row_stride, rows, 0, to[c]);
    }
}

// The sums of one output over the rows of a tile.
inline void add_up(const SparseDelta& d, int64_t output, const Slots& slots, const float* planes, float* sums) {
    F sum[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) sum[v] = broadcast(0.0f);
    for (int32_t e = d.row_offsets[output]; e < d.row_offsets[output + 1]; ++e) {
        const int64_t column = d.columns[e];
        const F value = broadcast(d.values[d.order ? d.order[e] : e]);
        const float* run = planes + (slots.of_group[column / TILE_COLS] * TILE_COLS + column % TILE_COLS) * ROWS;
        for (int64_t v = 0; v < VECTORS; ++v) sum[v] = fused(value, load(run + v * LANES), sum[v]);
    }
    for (int64_t v = 0; v < VECTORS; ++v) store_vector(sums + v * LANES, sum[v]);
}

inline void add_to(float* y, F v) { store_vector(y, load(y) + v); }
template <class T> inline void add_to(T* y, F v) {
    v = load(y) + v;
    for (int l = 0; l < LANES; ++l) round_to(v[l], y + l);
}

// Adds the sums of `outputs` <= TILE_COLS outputs, ROWS apart, to the first `rows` rows of y.
template <class T>
void add_tile(T* y, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t outputs, const float* sums) {
    for (int64_t o = 0; o < outputs; o += LANES) {
        for (int64_t r = 0; r < rows; r += LANES) {
            if (col_stride == 1 && o + LANES <= outputs) {
                F v[LANES];
                for (int l = 0; l < LANES; ++l) v[l] = load(sums + (o + l) * ROWS + r);
                transpose(v);
                for (int64_t l = 0; l < least(LANES, rows - r); ++l) add_to(y + (r + l) * row_stride + o, v[l]);
                continue;
            }
            for (int64_t l = 0; l < least(LANES, rows - r); ++l)
                for (int64_t k = o; k < least(o + LANES, outputs); ++k) {
                    T* const at = y + (r + l) * row_stride + k * col_stride;
                    round_to(to_float(*at) + sums[k * ROWS + r + l], at);
                }
        }
    }
}

template <class X, class Y> int sparse_delta_matmul_of(const Matrix& y, const Matrix& x, const SparseDelta& d, int threads) {
    const int64_t groups = ceil_div(x.cols, TILE_COLS), tiles = ceil_div(x.rows, ROWS);
    Scratch<int64_t> of_group(groups);
    if (!of_group) return fps::OUT_OF_MEMORY;
    Slots slots = {of_group.data, 0};
    find_slots(d, y.cols, groups, &slots);
    int failed = 0;
#pragma omp parallel if (threads > 1 && tiles > 1)
    {
        Scratch<float> planes(slots.count * TILE_COLS * ROWS), sums(TILE_COLS * ROWS);
        const bool ready = planes && sums;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < tiles; ++t) {
            if (!ready) continue;
            const int64_t row = t * ROWS, rows = least(ROWS, x.rows - row);
            lay_columns<X>(x, row, rows, slots, planes.data);
            for (int64_t o = 0; o < y.cols; o += TILE_COLS) {
                const int64_t outputs = least(TILE_COLS, y.cols - o);
                if (d.row_offsets[o] == d.row_offsets[o + outputs]) continue; // most columns of x carry nothing
                for (int64_t k = 0; k < TILE_COLS; ++k)
                    if (k < outputs) add_up(d, o + k, slots, planes.data, sums.data + k * ROWS);
                add_tile((Y*)y.data + row * y.row_stride + o * y.col_stride, y.row_stride, y.col_stride, rows, outputs,
                         sums.data);
            }
        }
    }
    return failed ? fps::OUT_OF_MEMORY : fps::OK;
}

} // namespace

int fps::FPS_ISA::sparse_delta_matmul(const Matrix& y, const Matrix& x, const SparseDelta& delta, int threads) {
    return with_dtype(x.dtype, [&](auto of_x) {
        return with_dtype(y.dtype, [&](auto of_y) {
            return sparse_delta_matmul_of<decltype(of_x), decltype(of_y)>(y, x, delta, threads);
        });
    });
}
