// score_kth (fps_kernels/ops/reference.py).
//
// score_kth reads the weights about once. The keys of a deterministic sample give a narrow interval that very probably
// holds the k-th largest key; one pass counts the keys above that interval and collects those inside it in a pool, among
// which the choice is exact. Where the interval missed, or held more keys than the pool, it is narrowed by passes that
// count keys in 4096 bins, each exact, until it fits or is a single key; so the answer never rests on the sample.
// Scratch: a pool of 4 to 16 MiB and a sample of 1 to 4 MiB (both 1/64 and 1/256 of the entries in between), per thread
// 300 KiB.
#include "parts/score_items.h"

namespace {

using fps::Matrix;

constexpr int64_t BINS = 1 << 12;
constexpr int64_t RUN = 16; // adjacent entries that are sampled together: a cache line

struct Interval {
    int32_t lo, hi; // both ends included
};

struct Search {
    const Matrix* weights;
    int64_t n, total, k;
    Item* items;
    int64_t n_items;
    int32_t* pool;
    int64_t capacity, used;
    int threads;
};

// ------------------------------------------------------------------------------------------------ passes over everything

// Counts every item's keys above and inside the interval, and collects those inside (unless it is a single key) as far
// as the pool reaches. Sets `used` to the number that wanted to be there.
int count_pass(Search& s, Interval in) {
    const bool collect = in.lo < in.hi;
    const int64_t tile_elements = largest_tile(s.weights, s.n);
    int failed = 0;
    s.used = 0;
#pragma omp parallel if (s.threads > 1 && s.n_items > 1)
    {
        Scratch<uint32_t> tile(tile_elements);
        Scratch<int32_t> found(ITEM + LANES);
        const bool ready = tile && found;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.n_items; ++i) {
            if (!ready) continue;
            Item& item = s.items[i];
            const I above = broadcast(in.hi), below = broadcast(in.lo - 1);
            int64_t greater = 0, inside = 0;
            if (collect) {
                for_item(s.weights, item, tile.data, [&](I here) {
                    const Mask high = gt(here, above), reached = gt(here, below);
                    greater += count(high);
                    if (high != reached) inside += compress(found.data + inside, reached ^ high, here);
                });
            } else {
                for_item(s.weights, item, tile.data, [&](I here) {
                    greater += count(gt(here, above));
                    inside += count(eq(here, above));
                });
            }
            item.greater = greater;
            item.inside = inside;
            if (collect && inside) {
                int64_t at;
#pragma omp atomic capture
                {
                    at = s.used;
                    s.used += inside;
                }
                item.pool_at = at;
                if (at + inside <= s.capacity) memcpy(s.pool + at, found.data, (size_t)inside * sizeof(int32_t));
            }
        }
    }
    return failed ? fps::OUT_OF_MEMORY : fps::OK;
}

// Narrows an interval known to hold the k-th largest key to one of BINS equal parts of it.
int histogram_pass(Search& s, Interval* in) {
    int shift = 0;
    while ((int64_t)(in->hi - in->lo) >> shift >= BINS) ++shift;
    Scratch<int64_t> bins(BINS);
    if (!bins) return fps::OUT_OF_MEMORY;
    memset(bins.data, 0, BINS * sizeof(int64_t));
    const int64_t tile_elements = largest_tile(s.weights, s.n);
    int64_t greater = 0;
    int failed = 0;
#pragma omp parallel if (s.threads > 1 && s.n_items > 1)
    {
        Scratch<uint32_t> tile(tile_elements);
        Scratch<int64_t> own(BINS);
        const bool ready = tile && own;
        int64_t above = 0;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        } else {
            memset(own.data, 0, BINS * sizeof(int64_t));
        }
        const I high = broadcast(in->hi), below = broadcast(in->lo - 1);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.n_items; ++i) {
            if (!ready) continue;
            for_item(s.weights, s.items[i], tile.data, [&](I here) {
                const Mask over = gt(here, high);
                above += count(over);
                for (Mask m = gt(here, below) ^ over; m; m &= m - 1) {
                    const int32_t one = here[__builtin_ctz(m)];
                    ++own.data[(one - in->lo) >> shift];
                }
            });
        }
#pragma omp critical(fps_histogram)
        {
            greater += above;
            for (int64_t b = 0; ready && b < BINS; ++b) bins.data[b] += own.data[b];
        }
    }
    if (failed) return fps::OUT_OF_MEMORY;
    int64_t bin = BINS - 1;
    for (; bin > 0 && greater + bins.data[bin] < s.k; --bin) greater += bins.data[bin];
    in->lo += (int32_t)(bin << shift);
    in->hi = (int32_t)least(in->hi, in->lo + ((int64_t)1 << shift) - 1);
    return fps::OK;
}

// ------------------------------------------------------------------------------------------------ the first interval

// The keys of RUN adjacent entries (along the direction that is adjacent in memory) from the flat position `at`.
template <class T> void sample_run(const Matrix& w, int64_t at, int32_t* to) {
    const bool by_column = needs_tiles(w.cols, w.col_stride);
    const int64_t inner = by_column ? w.rows : w.cols, size = w.rows * w.cols;
    int64_t outer = at / inner, within = at - outer * inner;
    for (int64_t i = 0; i < RUN; ++i) {
        const int64_t row = by_column ? within : outer, col = by_column ? outer : within;
        const T* w_at = (const T*)w.data + row * w.row_stride + col * w.col_stride;
        to[i] = key(to_float(*w_at), factors_of_row(w, row)[col]);
        if (++within == inner) within = 0, outer = (outer + 1) * inner < size ? outer + 1 : 0;
    }
}

// One run out of every `total / runs` entries, at a place that depends on its index alone.
void draw_sample(const Search& s, int64_t runs, int32_t* keys) {
    const int64_t stride = s.total / runs;
#pragma omp parallel for schedule(static) if (s.threads > 1)
    for (int64_t q = 0; q < runs; ++q) {
        uint64_t hash = (uint64_t)(q + 1) * 0x9e3779b97f4a7c15u;
        hash = (hash ^ hash >> 29) * 0xbf58476d1ce4e5b9u;
        int64_t at = q * stride + (int64_t)((hash >> 33) % (uint64_t)stride), t = 0;
        while (at >= s.weights[t].rows * s.weights[t].cols) at -= s.weights[t].rows * s.weights[t].cols, ++t;
        with_dtype(s.weights[t].dtype, [&](auto element) {
            sample_run<decltype(element)>(s.weights[t], at, keys + q * RUN);
            return 0;
        });
    }
}

int64_t root(int64_t n) {
    int64_t r = 0;
    while ((r + 1) * (r + 1) <= n) ++r;
    return r;
}

// An interval that probably holds the k-th largest key and, if so, hardly more keys than half the pool.
int first_interval(const Search& s, Interval* in) {
    const int64_t runs = most(1 << 17, least(1 << 20, s.total / 256)) / RUN, n = runs * RUN;
    Scratch<int32_t> sample(n + LANES), work(n + FEW + LANES);
    if (!sample || !work) return fps::OUT_OF_MEMORY;
    draw_sample(s, runs, sample.data);
    const int64_t rank = (int64_t)((double)s.k / (double)s.total * (double)n), rest = n - rank;
    // Ten standard deviations of a binomial count: entries of a run are alike, so that theirs is up to four times that.
    int64_t margin = 10 * root((int64_t)((double)rank * (double)rest / (double)n)) + 32;
    margin = least(margin, (int64_t)((double)s.capacity / 4 / (double)s.total * (double)n));
    if (rank > margin) in->hi = kth_of_many(sample.data, n, rank - margin, 0, NAN_KEY, work.data);
    if (rank + margin < n) in->lo = kth_of_many(sample.data, n, rank + margin, 0, in->hi, work.data);
    return fps::OK;
}

// ------------------------------------------------------------------------------------------------ the answer

// The k-th largest key once the interval holds it and all of its keys are in the pool.
int32_t kth_in_pool(const Search& s, Interval in, int64_t k) {
    while (in.lo < in.hi) {
        const int32_t middle = in.lo + (in.hi - in.lo) / 2;
        const I mid = broadcast(middle);
        int64_t above = 0, i = 0;
        for (; i + LANES <= s.used; i += LANES) above += count(gt(load_ints(s.pool + i), mid));
        for (; i < s.used; ++i) above += s.pool[i] > middle;
        if (above >= k)
            in.lo = middle + 1;
        else
            in.hi = middle;
    }
    return in.lo;
}

void count_in_pool(const Search& s, int32_t kth, int64_t* greater, int64_t* equal) {
    for (int64_t i = 0; i < s.n_items; ++i) {
        const Item& item = s.items[i];
        for (int64_t j = 0; j < item.inside; ++j) {
            greater[item.tensor] += s.pool[item.pool_at + j] > kth;
            equal[item.tensor] += s.pool[item.pool_at + j] == kth;
        }
    }
}

int search(Search& s, int32_t* kth, int64_t* greater, int64_t* equal) {
    Interval known = {0, NAN_KEY}, in = known; // `known` surely holds the answer
    if (s.total > s.capacity)
        if (int status = first_interval(s, &in)) return status;
    for (;;) {
        if (int status = count_pass(s, in)) return status;
        int64_t above = 0, inside = 0;
        for (int64_t i = 0; i < s.n_items; ++i) {
            above += s.items[i].greater;
            inside += s.items[i].inside;
        }
        if (s.k <= above) {
            known.lo = in.hi + 1;
        } else if (s.k > above + inside) {
            known.hi = in.lo - 1;
        } else {
            known = in;
            if (in.lo == in.hi || s.used <= s.capacity) {
                *kth = in.lo == in.hi ? in.lo : kth_in_pool(s, in, s.k - above);
                break;
            }
        }
        if (known.lo < known.hi)
            if (int status = histogram_pass(s, &known)) return status;
        in = known;
    }
    for (int64_t i = 0; i < s.n_items; ++i) {
        greater[s.items[i].tensor] += s.items[i].greater;
        if (in.lo == in.hi) equal[s.items[i].tensor] += s.items[i].inside;
    }
    if (in.lo < in.hi) count_in_pool(s, *kth, greater, equal);
    return fps::OK;
}

} // namespace

int fps::FPS_ISA::score_kth(const Matrix* w, int64_t n, int64_t k, float* threshold, int64_t* greater, int64_t* equal,
                            int threads) {
    Search s = {w, n, 0, k, nullptr, 0, nullptr, 0, 0, threads};
    for (int64_t t = 0; t < n; ++t) {
        s.total += w[t].rows * w[t].cols;
        s.n_items += count_items(w[t]);
        greater[t] = equal[t] = 0;
    }
    s.capacity = most(1 << 20, least(1 << 22, s.total / 64));
    Scratch<Item> items(s.n_items);
    Scratch<int32_t> pool(least(s.capacity, s.total));
    if (!items || !pool) return OUT_OF_MEMORY;
    s.items = items.data;
    s.pool = pool.data;
    list_items(w, n, s.items);
    int32_t kth = 0;
    const int status = search(s, &kth, greater, equal);
    *threshold = kth == NAN_KEY ? from_bits(0x7fc00000) : from_bits((uint32_t)kth);
    return status;
}
