// The pixels that a slice of a convolution's output meets, as float32 planes in which every kernel offset is a run.
//
// Along one axis, output position p and kernel offset u meet at pixel p * stride + u * dilation - padding. Offsets whose
// u * dilation leave the same remainder by the stride meet the same pixels, shifted: a plane holds these pixels once per
// remainder (a phase), adjacent, with the padding's zeros. Offset u of the output positions p, p + 1, ... is then a run of
// its phase. A stride of 1 has one phase, a patch embedding as many as the kernel has offsets; nothing is unfolded.
#pragma once

#include "parts/lanes.h"
#include "parts/rows.h"

namespace {

using fps::Convolution;
using fps::Images;

constexpr int64_t TILE_COLS = 16; // channels that are transposed together: a cache line of float32
constexpr int64_t AHEAD = 64;     // elements of a run: two tiles take about as long as memory

// A run of n elements `stride` apart as float32; zeros up to a whole vector follow. `ahead` elements further is what will be
// read soon: it is asked for in the second-level cache, because no prefetcher of the processor finds it.
template <class T> inline void copy_run(const T* from, int64_t stride, int64_t n, int64_t ahead, float* to) {
    int64_t i = 0;
    if (stride == 1) {
        for (; i + LANES <= n; i += LANES) {
            __builtin_prefetch(from + ahead + i, 0, 2);
            store_vector(to + i, load(from + i));
        }
        if (i < n) store_vector(to + i, load_first(from + i, n - i));
        return;
    }
    for (; i < n; ++i) to[i] = to_float(from[i * stride]);
    for (; i % LANES; ++i) to[i] = 0;
}

// LANES elements of each of LANES adjacent runs; to[c] + at is where run c goes on. `ahead` is what will be read soon.
template <class T>
inline void transpose_square(const T* from, int64_t stride, const T* ahead, float* const* to, int64_t at) {
    F v[LANES];
    for (int r = 0; r < LANES; ++r, from += stride, ahead += stride) {
        __builtin_prefetch(ahead, 0, 2);
        v[r] = load(from);
    }
    transpose(v);
    for (int r = 0; r < LANES; ++r) store_vector(to[r] + at, v[r]);
}

// The first `n` <= LANES elements of the first `cols` <= LANES of such runs, and zeros for the others.
template <class T>
void transpose_part(const T* from, int64_t stride, int64_t n, int64_t cols, float* const* to, int64_t at) {
    F v[LANES];
    for (int r = 0; r < LANES; ++r) {
        v[r] = broadcast(0.0f);
        if (r < n) v[r] = cols < LANES ? load_first(from + r * stride, cols) : load(from + r * stride);
    }
    transpose(v);
    for (int r = 0; r < LANES; ++r) store_vector(to[r] + at, v[r]);
}

// The same as copy_run for `cols` <= TILE_COLS adjacent runs at once: run c, whose elements are from[c + i * stride], goes
// to to[c].
template <class T> void transpose_runs(const T* from, int64_t stride, int64_t n, int64_t cols, float* const* to) {
    for (int64_t i = 0; i < n; i += LANES) {
        const T* here = from + i * stride;
        // A little further down these runs, then at the beginning of the next ones.
        const T* ahead = i + AHEAD < n ? here + AHEAD * stride : from + (n > AHEAD ? i + AHEAD - n : i) * stride + TILE_COLS;
        for (int64_t c = 0; c < cols; c += LANES) {
            if (i + LANES <= n && c + LANES <= cols)
                transpose_square(here + c, stride, ahead + c, to + c, i);
            else
                transpose_part(here + c, stride, least(LANES, n - i), least(LANES, cols - c), to + c, i);
        }
    }
}

// Zeros, up to a whole vector.
inline void zero_run(float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store_vector(to + i, broadcast(0.0f));
}

inline int64_t common_divisor(int64_t a, int64_t b) {
    while (b) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// One axis of a plane that serves `positions` output positions.
struct Axis {
    int64_t stride, dilation, padding;
    int64_t period; // kernel offsets after which phases repeat
    int64_t phases;
    int64_t beyond; // pixels of a phase that are met by the last kernel offsets only
    int64_t extent; // pixels of a phase

    Axis(const Convolution& conv, int axis, int64_t positions)
        : stride(conv.stride[axis]), dilation(conv.dilation[axis]), padding(axis == 0 ? conv.top : conv.left),
          period(stride / common_divisor(stride, dilation)), phases(least(period, conv.kernel[axis])),
          beyond((conv.kernel[axis] - 1) * dilation / stride), extent(positions + beyond) {}

    // Where offset u of the first output position lies.
    int64_t at(int64_t u) const { return u % period * extent + u * dilation / stride; }
    // The pixel at index i of a phase, for output positions that begin with `first`; it may lie in the padding.
    int64_t pixel(int64_t phase, int64_t first, int64_t i) const {
        return (first + i) * stride + phase * dilation % stride - padding;
    }
};

// A slice of the output: images x rows x columns.
struct Slice {
    int64_t image, images, row, rows, col, cols;
};

// How the output is cut into slices, and the planes of a slice of full size: [images][row phase][row][column phase][column].
struct Slices {
    int64_t batch, height, width;
    int64_t images, rows, cols; // of a full slice

    int64_t across() const { return ceil_div(width, cols); }
    int64_t down() const { return ceil_div(height, rows); }
    int64_t count() const { return ceil_div(batch, images) * down() * across(); }
    Slice slice(int64_t i) const {
        const int64_t col = i % across() * cols, row = i / across() % down() * rows, image = i / across() / down() * images;
        return {image, least(images, batch - image), row, least(rows, height - row), col, least(cols, width - col)};
    }
};

struct Planes {
    Axis down, across;
    int64_t row_pitch, image_pitch, pitch;

    Planes(const Convolution& conv, const Slices& s)
        : down(conv, 0, s.rows), across(conv, 1, s.cols), row_pitch(across.phases * across.extent),
          image_pitch(down.phases * down.extent * row_pitch),
          // Runs are written in whole vectors, and read so: what is beyond the last is never used.
          pitch(padded(s.images * image_pitch) + LANES) {}

    int64_t at(int64_t u, int64_t v) const { return down.at(u) * row_pitch + across.at(v); }
};

// One phase of every row of a slice: where it begins in the image, and which of its pixels lie in the image.
struct Run {
    int64_t origin, begin, end;
};

inline Run run_of(const Axis& across, int64_t phase, const Slice& slice, int64_t width) {
    const int64_t origin = across.pixel(phase, slice.col, 0), n = slice.cols + across.beyond;
    const int64_t begin = origin >= 0 ? 0 : least(n, ceil_div(-origin, across.stride));
    const int64_t end = origin >= width ? 0 : least(n, ceil_div(width - origin, across.stride));
    return {origin, begin, most(begin, end)};
}

// Calls `fn(pixels, begin, end, n, at)` for every run of a slice's planes, as they lie in memory: n numbers from `at` on, of
// which [begin, end) begin with *pixels in the first channel and the others are padding. `runs` is scratch [across.phases].
template <class T, class Fn>
inline void for_runs(const Images& x, const Planes& layout, const Slice& slice, Run* runs, Fn fn) {
    const Axis &down = layout.down, &across = layout.across;
    const int64_t n = slice.cols + across.beyond;
    for (int64_t phase = 0; phase < across.phases; ++phase) runs[phase] = run_of(across, phase, slice, x.width);
    for (int64_t image = 0; image < slice.images; ++image) {
        for (int64_t row_phase = 0; row_phase < down.phases; ++row_phase) {
            int64_t at = image * layout.image_pitch + row_phase * down.extent * layout.row_pitch;
            int64_t y = down.pixel(row_phase, slice.row, 0);
            for (int64_t row = 0; row < slice.rows + down.beyond; ++row, y += down.stride, at += layout.row_pitch) {
                const T* from = (const T*)x.data + (slice.image + image) * x.batch_stride + y * x.row_stride;
                const bool inside = y >= 0 && y < x.height;
                for (int64_t phase = 0; phase < across.phases; ++phase) {
                    const Run& run = runs[phase];
                    const T* pixels = from + (run.origin + run.begin * across.stride) * x.col_stride;
                    fn(pixels, run.begin, inside ? run.end : run.begin, n, at + phase * across.extent);
                }
            }
        }
    }
}

// Fills the plane of one channel for a slice; `next` is one that will follow soon. What is written beyond a run is
// overwritten by what comes after it.
template <class T>
void fill_plane(const Images& x, const Planes& layout, const Slice& slice, int64_t channel, int64_t next, float* plane,
                Run* runs) {
    const int64_t step = layout.across.stride * x.col_stride, ahead = (next - channel) * x.channel_stride;
    for_runs<T>(x, layout, slice, runs, [&](const T* pixels, int64_t begin, int64_t end, int64_t n, int64_t at) {
        float* to = plane + at;
        zero_run(to, begin);
        if (begin < end) copy_run(pixels + channel * x.channel_stride, step, end - begin, ahead, to + begin);
        zero_run(to + end, n - end);
    });
}

// The same for `channels` <= TILE_COLS channels, adjacent in memory, from `first` on; planes[c] is null where nobody needs
// channel c. `unused` has room for a run.
template <class T>
void fill_planes(const Images& x, const Planes& layout, const Slice& slice, int64_t first, int64_t channels,
                 float* const* planes, float* unused, Run* runs) {
    const int64_t step = layout.across.stride * x.col_stride;
    for_runs<T>(x, layout, slice, runs, [&](const T* pixels, int64_t begin, int64_t end, int64_t n, int64_t at) {
        float* to[TILE_COLS];
        for (int64_t c = 0; c < TILE_COLS; ++c) {
            to[c] = c < channels && planes[c] ? planes[c] + at + begin : unused;
            if (to[c] != unused) zero_run(to[c] - begin, begin);
        }
        if (begin < end) transpose_runs(pixels + first, step, end - begin, channels, to);
        for (int64_t c = 0; c < TILE_COLS; ++c)
            if (to[c] != unused) zero_run(to[c] - begin + end, n - end);
    });
}

} // namespace
