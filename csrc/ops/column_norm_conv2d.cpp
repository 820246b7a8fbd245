// column_norm_conv2d_ (fps_kernels/ops/reference.py): one read of x, which is never unfolded.
//
// The weight entry (c, u, v) meets the pixel (y, x) of channel c exactly when y = oy * stride + u * dilation - top for an
// output row oy, and likewise for x. Rows y that meet the same set of u form a class: all rows of a class, of all images,
// are added up before any horizontal work is done. There are few classes: about 2 kh for a stride of 1, kh for a patch
// embedding. What remains is one float64 row per class and channel, from which every (u, v) picks its pixels.
//
// Work is split into panels of channels and, where these are few, into chunks of images; each item owns float64 partials
// that are added in order. Scratch: at most 2 MiB of partials, and per thread at most 256 KiB or three times one channel's
// classes of rows.
#include "parts/column_sums.h"

namespace {

using fps::Convolution;
using fps::Images;

constexpr int64_t PANEL_ELEMENTS = 1 << 14; // float32 sums that one item works on
constexpr int64_t ITEM_ELEMENTS = 1 << 17;  // pixels that an item should have before images are split
constexpr int64_t MAX_ITEMS = 32;           // items to aim for
constexpr int64_t MAX_PARTIALS = (1 << 21) / sizeof(double);

// Whether kernel offset u meets pixel y in one dimension.
inline bool meets(const Convolution& conv, int axis, int64_t u, int64_t y) {
    const int64_t start = y + (axis == 0 ? conv.top : conv.left) - u * conv.dilation[axis];
    return start >= 0 && start % conv.stride[axis] == 0 && start / conv.stride[axis] < conv.outputs[axis];
}

inline bool same_set(const Convolution& conv, int64_t y, int64_t z) {
    for (int64_t u = 0; u < conv.kernel[0]; ++u)
        if (meets(conv, 0, u, y) != meets(conv, 0, u, z)) return false;
    return true;
}

// The class of every image row, and one row of every class.
struct Classes {
    int64_t n;
    int64_t* of;      // [height]
    int64_t* example; // [n], allocated as [height]
};

void classify(const Convolution& conv, int64_t height, Classes* classes) {
    classes->n = 0;
    for (int64_t y = 0; y < height; ++y) {
        int64_t found = classes->n; // the newest classes are the likeliest
        while (found > 0 && !same_set(conv, classes->example[found - 1], y)) --found;
        if (found == 0) {
            classes->example[classes->n++] = y;
            found = classes->n;
        }
        classes->of[y] = found - 1;
    }
}

// One panel of channels: how the sums of one class lie. Either the channels are adjacent in memory (channels-last) and the
// sums are [width, channels], or they are [channels, width].
struct Panel {
    int64_t first, channels, width;
    bool channels_last;
    int64_t size() const { return channels * width; }
    int64_t at(int64_t c, int64_t x) const { return channels_last ? x * channels + c : c * width + x; }
};

// Adds ROWS image rows from y on, of every channel of the panel, into `sums`.
template <int ORDER, int ROWS, class T>
void add_image_rows(const Images& x, const Panel& p, int64_t image, int64_t y, float* sums, T* line) {
    const T* from = (const T*)x.data + image * x.batch_stride + p.first * x.channel_stride + y * x.row_stride;
    if (p.channels_last && x.col_stride == p.channels) { // the panel is the whole pixel, so that a row is one run
        add_rows<ORDER, ROWS>(from, x.row_stride, p.size(), sums);
    } else if (p.channels_last) {
        for (int64_t i = 0; i < p.width; ++i)
            add_rows<ORDER, ROWS>(from + i * x.col_stride, x.row_stride, p.channels, sums + i * p.channels);
    } else if (x.col_stride == 1) {
        for (int64_t c = 0; c < p.channels; ++c)
            add_rows<ORDER, ROWS>(from + c * x.channel_stride, x.row_stride, p.width, sums + c * p.width);
    } else {
        for (int64_t r = 0; r < ROWS; ++r) {
            copy_tile(from + r * x.row_stride, x.channel_stride, x.col_stride, p.channels, p.width, line, p.width);
            add_rows<ORDER, 1>(line, 0, p.size(), sums);
        }
    }
}

// The pixels [begin, end) that kernel offset v meets, `step` apart.
struct Span {
    int64_t begin, end, step;
};

Span span_of(const Convolution& conv, int64_t v, int64_t width) {
    const int64_t step = conv.stride[1], origin = v * conv.dilation[1] - conv.left;
    const int64_t begin = origin >= 0 ? origin : origin + ceil_div(-origin, step) * step;
    return {begin, least(width, origin + (conv.outputs[1] - 1) * step + 1), step};
}

template <bool INF>
double sum_span(const Panel& p, const double* sums, int64_t c, int64_t begin, int64_t end, int64_t step) {
    double total = 0;
    const int64_t pitch = p.at(0, 1);
    const double* from = sums + p.at(c, 0);
    for (int64_t at = begin; at < end; at += step) combine(INF, from[at * pitch], &total);
    return total;
}

// Hands the sums of one class to the partials [channels, kh, kw]. With a stride of 1 all offsets share most of their pixels,
// which are added up once. `totals` is scratch [channels, kw].
template <bool INF>
void spread(const Convolution& conv, const Panel& p, int64_t y, const double* sums, double* totals, double* partials) {
    const int64_t kh = conv.kernel[0], kw = conv.kernel[1];
    const Span first = span_of(conv, 0, p.width), last = span_of(conv, kw - 1, p.width);
    const bool share = conv.stride[1] == 1 && last.begin < first.end;
    for (int64_t c = 0; c < p.channels; ++c) {
        const double shared = share ? sum_span<INF>(p, sums, c, last.begin, first.end, 1) : 0;
        for (int64_t v = 0; v < kw; ++v) {
            const Span span = span_of(conv, v, p.width);
            double total = shared;
            if (share) {
                combine(INF, sum_span<INF>(p, sums, c, span.begin, last.begin, 1), &total);
                combine(INF, sum_span<INF>(p, sums, c, first.end, span.end, 1), &total);
            } else {
                total = sum_span<INF>(p, sums, c, span.begin, span.end, span.step);
            }
            totals[c * kw + v] = total;
        }
    }
    for (int64_t u = 0; u < kh; ++u) {
        if (!meets(conv, 0, u, y)) continue;
        for (int64_t c = 0; c < p.channels; ++c)
            for (int64_t v = 0; v < kw; ++v) combine(INF, totals[c * kw + v], partials + (c * kh + u) * kw + v);
    }
}

// Scratch of one thread: for every class one row of sums, the rows added to it since it was last carried, and the carried.
template <class T> struct Lines {
    float* sums;
    int64_t* pending;
    double* carried;
    double* totals; // [channels, kw]
    T* line;
};

template <int ORDER, class T>
void sum_item(const Images& x, const Convolution& conv, const Classes& classes, const Panel& p, int64_t begin, int64_t end,
              const Lines<T>& scratch, double* partials) {
    constexpr bool INF = ORDER == fps::ORD_INF;
    const int64_t size = p.size();
    memset(scratch.sums, 0, (size_t)(classes.n * size + LANES) * sizeof(float));
    memset(scratch.carried, 0, (size_t)(classes.n * size) * sizeof(double));
    memset(scratch.pending, 0, (size_t)classes.n * sizeof(int64_t));
    for (int64_t image = begin; image < end; ++image) {
        for (int64_t y = 0; y < x.height;) {
            const int64_t here = classes.of[y];
            float* sums = scratch.sums + here * size;
            const bool four =
                y + 4 <= x.height && classes.of[y + 1] == here && classes.of[y + 2] == here && classes.of[y + 3] == here;
            if (scratch.pending[here] + 4 > TILE) {
                flush(INF, sums, size, scratch.carried + here * size);
                scratch.pending[here] = 0;
            }
            if (four)
                add_image_rows<ORDER, 4>(x, p, image, y, sums, scratch.line);
            else
                add_image_rows<ORDER, 1>(x, p, image, y, sums, scratch.line);
            scratch.pending[here] += four ? 4 : 1;
            y += four ? 4 : 1;
        }
    }
    for (int64_t k = 0; k < classes.n; ++k) {
        flush(INF, scratch.sums + k * size, size, scratch.carried + k * size);
        spread<INF>(conv, p, classes.example[k], scratch.carried + k * size, scratch.totals, partials);
    }
}

template <int ORDER, class T> int column_norm_conv2d_of(const Images& x, const Convolution& conv, double* acc, int threads) {
    const bool inf = ORDER == fps::ORD_INF;
    Scratch<int64_t> rows(2 * x.height);
    if (!rows) return fps::OUT_OF_MEMORY;
    Classes classes = {0, rows.data, rows.data + x.height};
    classify(conv, x.height, &classes);

    const bool channels_last = x.channel_stride == 1 && x.channels > 1 && x.col_stride != 1;
    const int64_t per_channel = conv.kernel[0] * conv.kernel[1], columns = x.channels * per_channel;
    int64_t panel = most(1, PANEL_ELEMENTS / (x.width * classes.n));
    if (channels_last) panel = most(16, panel / 16 * 16); // whole vectors
    panel = least(panel, x.channels);
    const int64_t panels = ceil_div(x.channels, panel), pixels = x.batch * x.channels * x.height * x.width;
    const int64_t wanted = least(least(x.batch, MAX_ITEMS / panels), pixels / panels / ITEM_ELEMENTS);
    const int64_t chunks = most(1, least(wanted, MAX_PARTIALS / columns));
    const int64_t chunk_images = ceil_div(x.batch, chunks), size = panel * x.width;
    Scratch<double> partials(chunks == 1 ? 0 : chunks * columns);
    if (!partials) return fps::OUT_OF_MEMORY;
    if (chunks > 1) memset(partials.data, 0, (size_t)(chunks * columns) * sizeof(double));
    int failed = 0;

#pragma omp parallel if (threads > 1 && chunks * panels > 1 && pixels > 2 * WORTH_THREADS)
    {
        Scratch<float> sums(classes.n * size + LANES); // the last vector of a run reaches beyond it
        Scratch<double> carried(classes.n * size);
        Scratch<int64_t> pending(classes.n);
        Scratch<double> totals(panel * conv.kernel[1]);
        Scratch<T> line(size);
        const bool ready = sums && carried && totals && pending && line;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
        const Lines<T> scratch = {sums.data, pending.data, carried.data, totals.data, line.data};
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < chunks * panels; ++item) {
            const int64_t chunk = item / panels, first = item % panels * panel, begin = chunk * chunk_images;
            const Panel p = {first, least(panel, x.channels - first), x.width, channels_last};
            double* into = (chunks == 1 ? acc : partials.data + chunk * columns) + first * per_channel;
            if (ready && begin < x.batch)
                sum_item<ORDER>(x, conv, classes, p, begin, least(begin + chunk_images, x.batch), scratch, into);
        }
    }
    if (failed) return fps::OUT_OF_MEMORY;
    for (int64_t chunk = 0; chunks > 1 && chunk < chunks; ++chunk)
        for (int64_t j = 0; j < columns; ++j) combine(inf, partials.data[chunk * columns + j], acc + j);
    return fps::OK;
}

} // namespace

int fps::FPS_ISA::column_norm_conv2d(const Images& x, const Convolution& conv, double* acc, int64_t order, int threads) {
    return with_dtype(x.dtype, [&](auto element) {
        return with_order(order, [&](auto constant) {
            return column_norm_conv2d_of<decltype(constant)::value, decltype(element)>(x, conv, acc, threads);
        });
    });
}
