// Scores as integers, and exact selection among them.
//
// The key of an entry is the bits of |fl32(w * a)|: on non-negative floats the integer order is the order of the numbers.
// Every NaN becomes the one key above infinity, so that NaN ranks above every number and all NaNs are equal. A lane that
// holds no entry has the key -1, below every score.
#pragma once

#include "rows.h"

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

// The k-th largest of n keys, n <= SMALL, where `v` is padded with -1 up to SMALL: the largest key that at least k keys
// reach. Counting for all of them at once has no branch to mispredict.
template <int SMALL> int32_t kth_of_few(const int32_t* v, int64_t n, int64_t k) {
    constexpr int VECTORS = SMALL / LANES;
    I reached[VECTORS];
    for (int i = 0; i < VECTORS; ++i) reached[i] = broadcast(0);
    for (int64_t at = 0; at < n; ++at) {
        const I one = broadcast(v[at]);
        for (int i = 0; i < VECTORS; ++i) reached[i] -= one >= load_ints(v + i * LANES);
    }
    I best = broadcast(-1);
    for (int i = 0; i < VECTORS; ++i) {
        const I here = load_ints(v + i * LANES);
        best = max(best, reached[i] >= broadcast((int32_t)k) ? here : broadcast(-1));
    }
    return max_lane(best);
}

constexpr int64_t FEW = 64;

// The k-th largest of n keys within [lo, hi], by halving that interval and keeping the half that holds it: at most 31
// rounds, each over fewer keys. Reads `v` (readable up to a multiple of LANES), works in `scratch` (n + FEW + LANES).
int32_t kth_of_many(const int32_t* v, int64_t n, int64_t k, int32_t lo, int32_t hi, int32_t* scratch) {
    const int32_t* from = v;
    while (lo < hi && n > FEW) {
        const int32_t middle = lo + (hi - lo) / 2;
        const I mid = broadcast(middle);
        int64_t above = 0;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) above += count(gt(load_ints(from + i), mid));
        const Mask rest = ((Mask)1 << (n - i)) - 1; // lanes of the last, incomplete vector
        if (i < n) above += count(gt(load_ints(from + i), mid) & rest);
        const bool up = above >= k;
        const Mask flip = up ? 0 : ((Mask)1 << LANES) - 1;
        int64_t kept = 0; // in place: what is written never reaches beyond what has been read
        for (i = 0; i + LANES <= n; i += LANES) {
            const I here = load_ints(from + i);
            kept += compress(scratch + kept, gt(here, mid) ^ flip, here);
        }
        if (i < n) {
            const I here = load_ints(from + i);
            kept += compress(scratch + kept, (gt(here, mid) ^ flip) & rest, here);
        }
        if (up) {
            lo = middle + 1;
        } else {
            hi = middle;
            k -= above;
        }
        n = kept;
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
