// sampled_grad and sampled_grad_conv2d (fps_kernels/ops/reference.py): one read of gy and, nearly, of x.
//
// Every entry is the dot product of one output channel of gy and one kernel offset of one channel of x, over all output
// positions. These are cut into slices. For each slice the planes of x (planes.h) that carry an entry are laid down in
// float32, to stay in the second-level cache; then the output channels are laid down likewise, 16 at a time, to stay in the
// first, and multiplied (dots.h). What costs is memory and, with many entries per channel, the way from the second-level
// cache to the first. A linear map is a convolution whose kernel is one pixel, on one image that is one row high.
//
// The sums of slices are added in order, and where the output is cut depends on shapes and on which channels carry entries
// only: threads change nothing. A lane adds at most 128 numbers of a slice in float32, and beyond MAX_ADDED slices what each
// addition loses is kept: if every rounding went the same way, an error would still be below 1e-5 of the sum of magnitudes.
//
// Scratch: the planes of one slice, at most 1 KiB per column that carries an entry for a linear map, otherwise PLANES_BYTES
// or what 2 * (kernel height) output rows of at most MAX_COLS positions meet; with several threads those of as many slices
// as HELD_BYTES hold; less than 80 KiB per thread for gy; 8 bytes per column of x and per channel; 4 bytes per entry beyond
// MAX_ADDED slices. Where groups are cut into parts, each thread has planes, of at least PART_CHANNELS channels, of its own.
#include "parts/dots.h"
#include "parts/planes.h"
#include "parts/recomputed.h"

namespace {

constexpr int64_t MAX_COLS = 240;       // an odd number of cache lines: runs side by side do not share cache sets
constexpr int64_t MAX_POSITIONS = 1024; // of a slice
constexpr int64_t MAX_ADDED = 32;
constexpr int64_t PLANES_BYTES = 1 << 20;
constexpr int64_t HELD_BYTES = 1 << 21;
constexpr int64_t ITEM_CHANNELS = 32; // of the output, the least that a thread takes: a cache line of 16-bit numbers
constexpr int64_t PART_CHANNELS = 16; // of x
constexpr int64_t SOON = 4;           // channels ahead: one takes some 30 ns, memory over 100

// Scratch that begins with a cache line: otherwise every load of a whole line would touch two.
struct Aligned {
    Scratch<char> memory;
    explicit Aligned(int64_t floats) : memory(floats * (int64_t)sizeof(float) + 64) {}
    explicit operator bool() const { return (bool)memory; }
    float* data() const { return (float*)(((uintptr_t)memory.data + 63) & ~(uintptr_t)63); }
};

struct Selection {
    const int32_t* row_offsets;        // [outputs + 1]
    const int32_t* columns;            // all that row_offsets count from
    int64_t outputs, groups, channels; // channels of one group
    int64_t nnz() const { return row_offsets[outputs] - row_offsets[0]; }
    int64_t group_of(int64_t row) const { return row / (outputs / groups); }
};

// ---------------------------------------------------------------------------------------------- the output's slices

inline bool rows_follow(const Images& x) { return x.height == 1 || x.row_stride == x.width * x.col_stride; }
inline bool images_follow(const Images& x) { return x.batch == 1 || x.batch_stride == x.width * x.col_stride; }
inline void join_rows(Images* x) { x->width *= x->height, x->height = 1; }
inline void join_images(Images* x) { x->width *= x->batch, x->batch = 1; }

// A 1x1 convolution sees no neighbours: rows that follow each other in memory are one row, and likewise images.
void flatten(Images* gy, Images* x, Convolution* conv) {
    const bool pointwise = conv->kernel[0] == 1 && conv->kernel[1] == 1 && conv->stride[0] == 1 && conv->stride[1] == 1;
    const bool unpadded = !conv->top && !conv->left && x->height == gy->height && x->width == gy->width;
    if (!pointwise || !unpadded || !rows_follow(*gy) || !rows_follow(*x)) return;
    join_rows(gy), join_rows(x);
    if (images_follow(*gy) && images_follow(*x)) join_images(gy), join_images(x);
    conv->outputs[0] = 1, conv->outputs[1] = gy->width;
}

// Rows of at most MAX_COLS positions, then as many rows, then as many images as the limits allow.
Slices cut(const Images& gy, const Convolution& conv, int64_t planes) {
    Slices s = {gy.batch, gy.height, gy.width, 1, 1, gy.width};
    if (s.width > MAX_COLS) s.cols = ceil_div(ceil_div(s.width, ceil_div(s.width, MAX_COLS)), 16) * 16;
    const int64_t pitch = ceil_div(s.cols, 16) * 16, limit = PLANES_BYTES / (int64_t)sizeof(float) / planes;
    // Neighbouring slices meet the same rows of x at their border: fewer rows than these would mostly be border.
    const int64_t least_rows = 2 * ((conv.kernel[0] - 1) * conv.dilation[0] / conv.stride[0] + 1);
    for (s.rows = most(1, least(s.height, MAX_POSITIONS / pitch)); s.rows > least_rows; --s.rows)
        if (Planes(conv, s).pitch <= limit) break;
    s.rows = ceil_div(s.height, s.down());
    if (s.rows == s.height) s.images = most(1, least(s.batch, MAX_POSITIONS / (s.rows * pitch)));
    while (s.images > 1 && Planes(conv, s).pitch > limit) --s.images;
    return s;
}

// ---------------------------------------------------------------------------------------------- what carries entries

// Which planes there are, and where every column of every group begins in them.
struct Places {
    int64_t planes;
    int64_t* of_column;  // [groups * channels * kernel]
    int64_t* of_channel; // [groups * channels]: its plane, or -1
};

void find_planes(const Selection& w, int64_t kernel, Places* places) {
    const int64_t per_group = w.channels * kernel, rows = w.outputs / w.groups;
    memset(places->of_column, 0, (size_t)(w.groups * per_group) * sizeof(int64_t));
    for (int64_t group = 0; group < w.groups; ++group) {
        const int32_t end = w.row_offsets[(group + 1) * rows];
        for (int32_t e = w.row_offsets[group * rows]; e < end; ++e) places->of_column[group * per_group + w.columns[e]] = 1;
    }
    places->planes = 0;
    for (int64_t c = 0; c < w.groups * w.channels; ++c) {
        bool any = false;
        for (int64_t k = 0; k < kernel; ++k) any = any || places->of_column[c * kernel + k];
        places->of_channel[c] = any ? places->planes++ : -1;
    }
}

void place_columns(const Convolution& conv, const Planes& layout, int64_t channels, Places* places) {
    int64_t* to = places->of_column;
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t u = 0; u < conv.kernel[0]; ++u)
            for (int64_t v = 0; v < conv.kernel[1]; ++v) *to++ = places->of_channel[c] * layout.pitch + layout.at(u, v);
}

// ---------------------------------------------------------------------------------------------- one slice

// Whether channels are laid down several at a time.
inline bool adjacent_channels(const Images& x) { return x.channel_stride == 1 && x.col_stride != 1 && x.channels >= 8; }

// Lays down the planes of the channels [first, first + channels); `next` will follow soon.
template <class T>
void lay_planes(const Images& x, const Planes& layout, const Slice& slice, const Places& places, int64_t first,
                int64_t channels, int64_t next, float* planes, float* unused, Run* runs) {
    float* to[TILE_COLS];
    for (int64_t c = 0; c < channels; ++c) {
        const int64_t plane = places.of_channel[first + c];
        to[c] = plane < 0 ? nullptr : planes + plane * layout.pitch;
    }
    if (adjacent_channels(x))
        fill_planes<T>(x, layout, slice, first, channels, to, unused, runs);
    else
        fill_plane<T>(x, layout, slice, first, next, to[0], runs);
}

// The products of the output channels [begin, end), at most TILE_COLS. `tile` is scratch for their runs of gy, `unused` for
// a run; of_column belongs to group 0 and has `per_group` columns.
template <class T>
void multiply_tile(const Images& gy, const Slice& slice, const Selection& w, const Walk& walk, int64_t begin, int64_t end,
                   const float* planes, const int64_t* of_column, int64_t per_group, float* tile, float* unused,
                   Batch* batch) {
    const bool adjacent = adjacent_channels(gy);
    const int64_t pitch = walk.rows * walk.pitch;
    const T* from =
        (const T*)gy.data + slice.image * gy.batch_stride + slice.row * gy.row_stride + slice.col * gy.col_stride;
    const auto for_rows_of = [&](int64_t channel, auto fn) {
        for (int64_t image = 0; image < slice.images; ++image)
            for (int64_t row = 0; row < slice.rows; ++row)
                fn((image * slice.rows + row) * walk.pitch,
                   from + image * gy.batch_stride + row * gy.row_stride + channel * gy.channel_stride);
    };
    if (adjacent)
        for_rows_of(begin, [&](int64_t at, const T* run) {
            float* to[TILE_COLS];
            for (int64_t c = 0; c < TILE_COLS; ++c) to[c] = c < end - begin ? tile + c * pitch + at : unused;
            transpose_runs(run, gy.col_stride, slice.cols, end - begin, to);
        });
    for (int64_t i = begin; i < end; ++i) {
        const int32_t first = w.row_offsets[i], entries = w.row_offsets[i + 1] - first;
        if (!entries) continue;
        float* channel = adjacent ? tile + (i - begin) * pitch : tile;
        if (!adjacent)
            for_rows_of(i, [&](int64_t at, const T* run) {
                copy_run(run, gy.col_stride, slice.cols, SOON * gy.channel_stride, channel + at);
            });
        batch->add(walk, channel, planes, of_column + w.group_of(i) * per_group, w.columns + first, entries);
    }
}

// ---------------------------------------------------------------------------------------------- all slices

template <class TG, class TX>
int sampled_grad_of(const Images& gy, const Images& x, const Convolution& conv, const Selection& w, const Recomputed& how,
                    float* grad, int threads, bool inside = false) {
    const int64_t kernel = conv.kernel[0] * conv.kernel[1], nnz = w.nnz();
    Scratch<int64_t> of_column(x.channels * kernel), of_channel(x.channels), blocks(x.channels);
    if (!of_column || !of_channel || !blocks) return fps::OUT_OF_MEMORY;
    Places places = {0, of_column.data, of_channel.data};
    find_planes(w, kernel, &places);
    const Slices slices = cut(gy, conv, places.planes);
    const Planes layout(conv, slices);
    place_columns(conv, layout, x.channels, &places);

    const int64_t block = adjacent_channels(x) ? TILE_COLS : 1;
    int64_t n_blocks = 0; // those that carry an entry
    for (int64_t c = 0; c < x.channels; ++c) {
        const bool counted = n_blocks > 0 && blocks.data[n_blocks - 1] == c / block;
        if (places.of_channel[c] >= 0 && !counted) blocks.data[n_blocks++] = c / block;
    }

    // Several threads lay down the planes of several slices before they go on: they seldom wait for each other.
    const bool parallel = threads > 1 && gy.batch * gy.height * gy.width * (w.outputs + nnz / 8) > WORTH_THREADS;
    const int64_t size = places.planes * layout.pitch, rows = slices.images * slices.rows;
    const int64_t held = parallel ? most(1, least(slices.count(), HELD_BYTES / (int64_t)sizeof(float) / size)) : 1;
    const int64_t share = parallel ? ceil_div(ceil_div(w.outputs, 4 * threads), ITEM_CHANNELS) * ITEM_CHANNELS : w.outputs;

    const bool exact = slices.count() > MAX_ADDED;
    Scratch<int64_t> at(rows);
    Aligned planes(held * size), lost(exact ? nnz : 0);
    if (!at || !planes || !lost) return fps::OUT_OF_MEMORY;
    for (int64_t r = 0; r < rows; ++r)
        at.data[r] = r / slices.rows * layout.image_pitch + r % slices.rows * layout.row_pitch;
    memset(grad + w.row_offsets[0], 0, (size_t)nnz * sizeof(float));
    if (exact) memset(lost.data(), 0, (size_t)nnz * sizeof(float));
    int failed = 0;

    const auto work = [&] {
        Aligned tile(TILE_COLS * rows * padded(slices.cols)), unused(padded(layout.across.extent));
        Scratch<Run> runs(layout.across.phases);
        const bool ready = tile && unused && runs;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
        // Last slices first: they were written last, so that they may still be in the cache.
        for (int64_t end = slices.count(); end > 0; end -= held) {
            const int64_t begin = most(0, end - held);
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < (end - begin) * n_blocks; ++item) {
                const int64_t slot = item / n_blocks, at_block = item % n_blocks, first = blocks.data[at_block] * block;
                const int64_t next = blocks.data[least(at_block + SOON, n_blocks - 1)] * block;
                if (!ready) continue;
                const Slice slice = slices.slice(begin + slot);
                const int64_t channels = least(block, x.channels - first);
                float* const to = planes.data() + slot * size;
                lay_planes<TX>(x, layout, slice, places, first, channels, next, to, unused.data(), runs.data);
                for (int64_t c = first; how.operation != fps::ITSELF && c < first + channels; ++c)
                    if (places.of_channel[c] >= 0)
                        recompute(how, c, slice.col, slice.cols, to + places.of_channel[c] * layout.pitch);
            }
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < ceil_div(w.outputs, share); ++item) {
                const int64_t first = item * share, last = least(first + share, w.outputs), entry = w.row_offsets[first];
                for (int64_t s = end - 1; ready && s >= begin; --s) {
                    const Slice slice = slices.slice(s);
                    const int64_t pitch = padded(slice.cols);
                    const Walk walk = {slice.images * slice.rows, pitch, at.data,
                                       iota() < broadcast((int32_t)(slice.cols - pitch + LANES))};
                    Batch batch(grad + entry, exact ? lost.data() + entry - w.row_offsets[0] : nullptr);
                    for (int64_t i = first; i < last; i += TILE_COLS) {
                        const int64_t stop = least(i + TILE_COLS, last);
                        if (w.row_offsets[i] < w.row_offsets[stop])
                            multiply_tile<TG>(gy, slice, w, walk, i, stop, planes.data() + (s - begin) * size,
                                              places.of_column, w.channels * kernel, tile.data(), unused.data(), &batch);
                    }
                    batch.flush();
                }
            }
        }
    };
    // A region of one thread costs as much as a small layer's gradients. Inside of another one there has to be one, to which
    // the loops belong.
    if (parallel || inside) {
#pragma omp parallel if (parallel)
        work();
    } else {
        work();
    }
    return failed ? fps::OUT_OF_MEMORY : fps::OK;
}

// Many small groups, such as the channels of a depthwise convolution, have nothing to share: parts of them are problems of
// their own, and no thread ever waits for another.
template <class TG, class TX>
int sampled_grad_in_parts(const Images& gy, const Images& x, const Convolution& conv, const Selection& w, float* grad,
                          int threads) {
    const Recomputed itself = {};
    if (w.groups == 1 || w.channels > PART_CHANNELS) return sampled_grad_of<TG, TX>(gy, x, conv, w, itself, grad, threads);
    const int64_t part = ceil_div(PART_CHANNELS, w.channels), parts = ceil_div(w.groups, part),
                  outputs = w.outputs / w.groups;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) if (threads > 1 && gy.batch * gy.height * gy.width * w.outputs > WORTH_THREADS)
    for (int64_t i = 0; i < parts; ++i) {
        const int64_t first = i * part, groups = least(part, w.groups - first);
        Images part_gy = gy, part_x = x;
        part_gy.data = (const TG*)gy.data + first * outputs * gy.channel_stride;
        part_gy.channels = groups * outputs;
        part_x.data = (const TX*)x.data + first * w.channels * x.channel_stride;
        part_x.channels = groups * w.channels;
        const Selection part_w = {w.row_offsets + first * outputs, w.columns, part_gy.channels, groups, w.channels};
        if (part_w.nnz() && sampled_grad_of<TG, TX>(part_gy, part_x, conv, part_w, itself, grad, 1, true) != fps::OK) {
#pragma omp atomic write
            failed = 1;
        }
    }
    return failed ? fps::OUT_OF_MEMORY : fps::OK;
}

// ---------------------------------------------------------------------------------------------- linear maps

constexpr int64_t FEW_ROWS = 16;
constexpr int64_t SUMMED = 128; // rows that are added before their sum is: rounding grows with the longer of both

// Without any scratch: of so few rows nothing is worth preparing.
template <class TG, class TX> void few_rows(const LinearGradients& of) {
    const TG* gy = (const TG*)of.gy;
    const TX* x = (const TX*)of.x;
    for (int64_t o = 0; o < of.outputs; ++o, gy += of.gy_col_stride)
        for (int32_t e = of.row_offsets[o]; e < of.row_offsets[o + 1]; ++e) {
            const TX* column = x + of.columns[e] * of.x_col_stride;
            float sum = 0;
            for (int64_t m = 0; m < of.rows; ++m)
                sum += to_float(gy[m * of.gy_row_stride]) * to_float(column[m * of.x_row_stride]);
            of.grad[e] = sum;
        }
}

template <class TG> int sum_rows_of(const LinearGradients& of) {
    Scratch<float> part(of.outputs);
    if (!part) return fps::OUT_OF_MEMORY;
    memset(of.bias, 0, (size_t)of.outputs * sizeof(float));
    for (int64_t begin = 0; begin < of.rows; begin += SUMMED) {
        memset(part.data, 0, (size_t)of.outputs * sizeof(float));
        for (int64_t m = begin; m < least(begin + SUMMED, of.rows); ++m) {
            const TG* row = (const TG*)of.gy + m * of.gy_row_stride;
            for (int64_t o = 0; o < of.outputs; ++o) part.data[o] += to_float(row[o * of.gy_col_stride]);
        }
        for (int64_t o = 0; o < of.outputs; ++o) of.bias[o] += part.data[o];
    }
    return fps::OK;
}

template <class TG, class TX> int linear_gradients_of(const LinearGradients& of, int threads) {
    if (of.bias && sum_rows_of<TG>(of) != fps::OK) return fps::OUT_OF_MEMORY;
    if (of.rows <= FEW_ROWS && of.recomputed.operation == fps::ITSELF) {
        few_rows<TG, TX>(of);
        return fps::OK;
    }
    // A 1x1 convolution of one image, one row high, whose channels are the columns.
    const Images gy = {of.gy, 1, of.outputs, 1, of.rows, 0, of.gy_col_stride, 0, of.gy_row_stride, of.gy_dtype};
    const Images x = {of.x, 1, of.inputs, 1, of.rows, 0, of.x_col_stride, 0, of.x_row_stride, of.x_dtype};
    const Convolution conv = {{1, 1}, {1, 1}, {1, 1}, 0, 0, {1, of.rows}, 1};
    const Selection w = {of.row_offsets, of.columns, of.outputs, 1, of.inputs};
    return sampled_grad_of<TG, TX>(gy, x, conv, w, of.recomputed, of.grad, threads);
}

} // namespace

int fps::FPS_ISA::sampled_grad(const Images& gy, const Images& x, const Convolution& conv, const int32_t* row_offsets,
                               const int32_t* columns, float* grad, int threads) {
    Images flat_gy = gy, flat_x = x;
    Convolution flat = conv;
    flatten(&flat_gy, &flat_x, &flat);
    const Selection w = {row_offsets, columns, gy.channels, conv.groups, x.channels / conv.groups};
    return with_dtype(gy.dtype, [&](auto output) {
        return with_dtype(x.dtype, [&](auto input) {
            return sampled_grad_in_parts<decltype(output), decltype(input)>(flat_gy, flat_x, flat, w, grad, threads);
        });
    });
}

int fps::FPS_ISA::linear_gradients(const LinearGradients& of, int threads) {
    return with_dtype(of.gy_dtype, [&](auto output) {
        return with_dtype(of.x_dtype,
                          [&](auto input) { return linear_gradients_of<decltype(output), decltype(input)>(of, threads); });
    });
}
