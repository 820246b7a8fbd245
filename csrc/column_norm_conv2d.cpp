// column_norm_conv2d_ (fps_kernels/ops/reference.py): one read of x, which is never unfolded.
//
// The weight entry (c, u, v) meets the pixel (y, x) of channel c exactly when y = oy * stride + u * dilation - top for an
// output row oy, and likewise for x. So rows y that meet the same set of u can be added up, over all images, before any
// horizontal work is done. Taken in the order of their remainder modulo the stride there are few such sets: about 2 kh for
// a stride of 1, one per row of the kernel for a patch embedding. What remains per set is one float64 row per channel,
// from which every (u, v) picks its pixels.
//
// Work is split into panels of channels and, where these are few, into chunks of images; each item owns float64 partials
// that are added in order. Scratch: at most 2 MiB of partials and about 100 KiB per thread.
#include "column_sums.h"

namespace {

using fps::Convolution;
using fps::Images;

constexpr int64_t PANEL_ELEMENTS = 4096; // float32 sums that one item works on: they stay in the L1 cache
constexpr int64_t MAX_ITEMS = 32;        // items to aim for
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

// One panel of channels: where its sums lie. Either the channels are adjacent in memory (channels-last) and the sums are
// [width, channels], or they are [channels, width].
struct Panel {
    int64_t first, channels, width;
    bool channels_last;
    int64_t size() const { return channels * width; }
    int64_t at(int64_t c, int64_t x) const { return channels_last ? x * channels + c : c * width + x; }
};

// Adds one image row y of every channel of the panel into `sums`.
template <int ORDER, class T>
void add_image_row(const Images& x, const Panel& p, int64_t image, int64_t y, float* sums, T* line) {
    const T* from = (const T*)x.data + image * x.batch_stride + p.first * x.channel_stride + y * x.row_stride;
    if (p.channels_last) {
        if (x.col_stride == p.channels) { // the panel is the whole pixel, so that the row is one run
            add_rows<ORDER, 1>(from, 0, p.size(), sums);
        } else {
            for (int64_t i = 0; i < p.width; ++i) add_rows<ORDER, 1>(from + i * x.col_stride, 0, p.channels, sums + i * p.channels);
        }
    } else if (x.col_stride == 1) {
        if (p.channels == 1 || x.channel_stride == p.width) {
            add_rows<ORDER, 1>(from, 0, p.size(), sums);
        } else {
            for (int64_t c = 0; c < p.channels; ++c) add_rows<ORDER, 1>(from + c * x.channel_stride, 0, p.width, sums + c * p.width);
        }
    } else {
        copy_tile(from, x.channel_stride, x.col_stride, p.channels, p.width, line, p.width);
        add_rows<ORDER, 1>(line, 0, p.size(), sums);
    }
}

// Hands the sums of the rows that meet the same u as row y to the partials [channels, kh, kw].
template <bool INF> void spread(const Convolution& conv, const Panel& p, int64_t y, const double* sums, double* partials) {
    const int64_t kh = conv.kernel[0], kw = conv.kernel[1];
    for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t v = 0; v < kw; ++v) {
            double total = 0;
            for (int64_t ox = 0; ox < conv.outputs[1]; ++ox) {
                const int64_t at = ox * conv.stride[1] + v * conv.dilation[1] - conv.left;
                if (at >= 0 && at < p.width) combine(INF, sums[p.at(c, at)], &total);
            }
            for (int64_t u = 0; u < kh; ++u)
                if (meets(conv, 0, u, y)) combine(INF, total, partials + (c * kh + u) * kw + v);
        }
    }
}

// Scratch of one thread.
template <class T> struct Lines {
    float* sums;
    double* carried;
    T* line;
};

template <int ORDER, class T>
void sum_item(const Images& x, const Convolution& conv, const Panel& p, int64_t begin, int64_t end, const Lines<T>& scratch,
              double* partials) {
    constexpr bool INF = ORDER == fps::ORD_INF;
    int64_t previous = -1, pending = 0; // the last row seen; the rows added since the last carry
    memset(scratch.sums, 0, (size_t)(p.size() + LANES) * sizeof(float));
    memset(scratch.carried, 0, (size_t)p.size() * sizeof(double));
    for (int64_t remainder = 0; remainder < conv.stride[0]; ++remainder) {
        for (int64_t y = remainder; y < x.height; y += conv.stride[0]) {
            if (previous >= 0 && !same_set(conv, previous, y)) {
                flush(INF, scratch.sums, p.size(), scratch.carried);
                spread<INF>(conv, p, previous, scratch.carried, partials);
                memset(scratch.carried, 0, (size_t)p.size() * sizeof(double));
                pending = 0;
            }
            previous = y;
            for (int64_t image = begin; image < end; ++image) {
                add_image_row<ORDER>(x, p, image, y, scratch.sums, scratch.line);
                if (++pending == TILE) {
                    flush(INF, scratch.sums, p.size(), scratch.carried);
                    pending = 0;
                }
            }
        }
    }
    flush(INF, scratch.sums, p.size(), scratch.carried);
    spread<INF>(conv, p, previous, scratch.carried, partials);
}

template <int ORDER, class T> int column_norm_conv2d_of(const Images& x, const Convolution& conv, double* acc, int threads) {
    const bool inf = ORDER == fps::ORD_INF;
    const bool channels_last = x.channel_stride == 1 && x.channels > 1 && x.col_stride != 1;
    const int64_t per_channel = conv.kernel[0] * conv.kernel[1], columns = x.channels * per_channel;
    const int64_t panel = least(x.channels, most(1, PANEL_ELEMENTS / x.width)), panels = ceil_div(x.channels, panel);
    const int64_t chunks = most(1, least(least(x.batch, MAX_ITEMS / panels), MAX_PARTIALS / columns));
    const int64_t chunk_images = ceil_div(x.batch, chunks), size = panel * x.width;
    Scratch<double> partials(chunks == 1 ? 0 : chunks * columns);
    if (!partials) return fps::OUT_OF_MEMORY;
    if (chunks > 1) memset(partials.data, 0, (size_t)(chunks * columns) * sizeof(double));
    int failed = 0;

#pragma omp parallel if (threads > 1 && chunks * panels > 1 && x.batch * x.channels * x.height * x.width > (1 << 16))
    {
        Scratch<float> sums(size + LANES); // the last vector of a run reaches beyond it
        Scratch<double> carried(size);
        Scratch<T> line(size);
        const bool ready = sums && carried && line;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
        const Lines<T> scratch = {sums.data, carried.data, line.data};
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < chunks * panels; ++item) {
            const int64_t chunk = item / panels, first = item % panels * panel, begin = chunk * chunk_images;
            const Panel p = {first, least(panel, x.channels - first), x.width, channels_last};
            double* into = (chunks == 1 ? acc : partials.data + chunk * columns) + first * per_channel;
            if (ready && begin < x.batch)
                sum_item<ORDER>(x, conv, p, begin, least(begin + chunk_images, x.batch), scratch, into);
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
