// Scores as integers, and exact selection among them.
//
// The key of an entry is the bits of |fl32(w * a)|: on non-negative floats the integer order is the order of the numbers.
// Every NaN becomes the one key above infinity, so that NaN ranks above every number and all NaNs are equal. A lane that
// holds no entry has the key -1, below every score.
#pragma once

#include "parts/rows.h"

namespace {

constexpr int32_t NAN_KEY = 0x7f800001;

inline I keys(F w, F a) { return min((I)(w * a) & 0x7fffffff, broadcast(NAN_KEY)); }

inline int32_t key(float w, float a) {
    const int32_t bits = (int32_t)(to_bits(w * a) & 0x7fffffff);
    return bits < NAN_KEY ? bits : NAN_KEY;
}

// Calls `fn(j, keys)` for the columns [0, cols) of one row, LANES at a time.
template <class T, class Fn> inline void for_keys(const T* w, const float* a, int64_t cols, Fn fn) {
    int64_t j = 0;
    for (; j + LANES <= cols; j += LANES) fn(j, keys(load(w + j), load(a + j)));
    if (j < cols) {
        const I last = keys(load_first(w + j, cols - j), load_first(a + j, cols - j));
        fn(j, iota() < broadcast((int32_t)(cols - j)) ? last : broadcast(-1));
    }
}

inline const float* factors_of_row(const fps::Matrix& w, int64_t row) {
    return w.groups == 1 ? w.factors : w.factors + row / (w.rows / w.groups) * w.cols;
}

// For each of SMALL keys `v`, padded with -1, how many of the first n of them it does not exceed. Counting for all of them
// at once has no branch to mispredict.
template <int SMALL> inline void ranks_of_few(const int32_t* v, int64_t n, I* ranks) {
    constexpr int VECTORS = SMALL / LANES;
    for (int i = 0; i < VECTORS; ++i) ranks[i] = broadcast(0);
    for (int64_t at = 0; at < n; ++at) {
        const I one = broadcast(v[at]);
        for (int i = 0; i < VECTORS; ++i) ranks[i] -= one >= load_ints(v + i * LANES);
    }
}

// The k-th largest: the largest key that at least k keys reach.
template <int SMALL> inline int32_t kth_by_rank(const int32_t* v, const I* ranks, int64_t k) {
    I best = broadcast(-1);
    for (int i = 0; i < SMALL / LANES; ++i)
        best = max(best, ranks[i] >= broadcast((int32_t)k) ? load_ints(v + i * LANES) : broadcast(-1));
    return max_lane(best);
}

template <int SMALL> inline int32_t kth_of_few(const int32_t* v, int64_t n, int64_t k) {
    I ranks[SMALL / LANES];
    ranks_of_few<SMALL>(v, n, ranks);
    return kth_by_rank<SMALL>(v, ranks, k);
}

constexpr int64_t FEW = 64;

// Counts the keys above `hi`, and packs those in [lo, hi] into `to`, which may be `v` itself: what is written never reaches
// beyond what has been read.
inline int64_t pack(const int32_t* v, int64_t n, int32_t lo, int32_t hi, int32_t* to, int64_t* above) {
    const I high = broadcast(hi), below = broadcast(lo - 1);
    int64_t kept = 0, over = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const I here = load_ints(v + i);
        Mask exceeds = gt(here, high), reaches = gt(here, below);
        if (n - i < LANES) { // lanes of the last, incomplete vector
            const Mask real = ((Mask)1 << (n - i)) - 1;
            exceeds &= real;
            reaches &= real;
        }
        over += count(exceeds);
        kept += compress(to + kept, reaches & ~exceeds, here);
    }
    *above = over;
    return kept;
}

// An interval around the k-th largest of n > FEW keys, guessed from FEW of them: two standard deviations to either side.
inline void guess(const int32_t* v, int64_t n, int64_t k, int32_t* lo, int32_t* hi) {
    int32_t few[FEW];
    for (int64_t i = 0; i < FEW; ++i) few[i] = v[(uint64_t)(i * n) / FEW];
    I ranks[FEW / LANES];
    ranks_of_few<FEW>(few, FEW, ranks);
    const float expected = (float)k / (float)n * (float)FEW;
    const int64_t rank = (int64_t)expected;
    const int64_t margin = 1 + (int64_t)(2.0f * __builtin_sqrtf(expected * (1.0f - expected / (float)FEW)));
    if (rank - margin >= 1) *hi = kth_by_rank<FEW>(few, ranks, rank - margin);
    if (rank + margin < FEW) *lo = kth_by_rank<FEW>(few, ranks, rank + margin + 1);
}

// The k-th largest of n keys, which lies in [lo, hi]: after one guess by halving that interval and keeping the half that
// holds it, at most 31 rounds, each over fewer keys. Reads `v` (readable up to a multiple of LANES), works in `scratch`
// (n + FEW + LANES).
int32_t kth_of_many(const int32_t* v, int64_t n, int64_t k, int32_t lo, int32_t hi, int32_t* scratch) {
    const int32_t* from = v;
    int64_t above = 0;
    if (n > FEW) {
        int32_t low = lo, high = hi;
        guess(v, n, k, &low, &high);
        low = low < lo ? lo : low;
        high = high > hi ? hi : high;
        const int64_t inside = low <= high ? pack(v, n, low, high, scratch, &above) : 0;
        if (low <= high && k <= above) {
            lo = high + 1;
        } else if (low <= high && k > above + inside) {
            hi = low - 1;
        } else if (low <= high) {
            k -= above;
            n = inside;
            lo = low;
            hi = high;
            from = scratch;
        }
    }
    while (lo < hi && n > FEW) {
        const int32_t middle = lo + (hi - lo) / 2;
        const I mid = broadcast(middle);
        above = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            const Mask exceeds = gt(load_ints(from + i), mid);
            above += count(n - i < LANES ? exceeds & (((Mask)1 << (n - i)) - 1) : exceeds);
        }
        int64_t unused;
        if (above >= k) {
            lo = middle + 1;
            n = pack(from, n, lo, NAN_KEY, scratch, &unused);
        } else {
            hi = middle;
            k -= above;
            n = pack(from, n, 0, hi, scratch, &unused);
        }
        from = scratch;
    }
    if (lo == hi) return lo;
    int32_t few[FEW];
    for (int64_t i = 0; i < FEW; ++i) few[i] = i < n ? from[i] : -1;
    return kth_of_few<FEW>(few, n, k);
}

// Appends to `to` the columns j + lane where the key is above `threshold`, and the first `ties` of those equal to it.
// Writes up to LANES elements beyond what it returns.
inline int64_t take(int64_t j, I here, I threshold, int64_t* ties, int32_t* to) {
    Mask chosen = gt(here, threshold);
    Mask equal = eq(here, threshold);
    if (*ties == 0) equal = 0;
    if (!(chosen | equal)) return 0;
    const int there = count(equal);
    if (there > *ties)
        for (int drop = there - (int)*ties; drop > 0; --drop) equal &= ~((Mask)1 << (31 - __builtin_clz(equal)));
    *ties -= count(equal);
    return compress(to, chosen | equal, iota() + broadcast((int32_t)j));
}

} // namespace
