// Many dot products of float32 runs: four at once against the same run, lane by lane, and lanes added up last.
#pragma once

#include "parts/lanes.h"
#include "parts/rows.h"

namespace {

constexpr int64_t BATCH = 64; // products whose lanes are added up together

// What the products have in common: `rows` runs of `pitch` numbers, whole vectors.
struct Walk {
    int64_t rows, pitch;
    const int64_t* at; // [rows]: where each run lies in the second factor; in the first they are adjacent
    I last;            // the lanes of a run's last vector that count
};

// Lane sums of N products with the same first factor.
template <int N> inline void multiply(const Walk& walk, const float* first, const float* const* second, float* sums) {
    F even[N], odd[N];
    for (int e = 0; e < N; ++e) even[e] = odd[e] = broadcast(0.0f);
    for (int64_t r = 0; r < walk.rows; ++r, first += walk.pitch) {
        const int64_t at = walk.at[r];
        int64_t i = 0;
        for (; i + 2 * LANES < walk.pitch; i += 2 * LANES) {
            const F a = load(first + i), b = load(first + i + LANES);
            for (int e = 0; e < N; ++e) {
                even[e] = fused(a, load(second[e] + at + i), even[e]);
                odd[e] = fused(b, load(second[e] + at + i + LANES), odd[e]);
            }
        }
        if (i + LANES < walk.pitch) {
            const F a = load(first + i);
            for (int e = 0; e < N; ++e) odd[e] = fused(a, load(second[e] + at + i), odd[e]);
            i += LANES;
        }
        const F a = load(first + i); // zero beyond the run; what lies there in the second factor could be infinity
        for (int e = 0; e < N; ++e) even[e] = fused(a, (F)((I)load(second[e] + at + i) & walk.last), even[e]);
    }
    for (int e = 0; e < N; ++e) store_vector(sums + e * LANES, even[e] + odd[e]);
}

// Adds the lane sums of n products to their results. `lost` holds what earlier additions lost, or is null.
inline void add_lanes(const float* sums, int64_t n, float* results, float* lost) {
    for (int64_t e = 0; e < n; e += LANES) {
        const int64_t here = least(LANES, n - e);
        const F part = sum_rows(sums + e * LANES),
                before = here == LANES ? load(results + e) : load_first(results + e, here);
        F total = before + part;
        if (lost) { // Kahan's summation; nothing is lost of infinity
            const F wanted = part - (here == LANES ? load(lost + e) : load_first(lost + e, here));
            total = before + wanted;
            const F error = (total - before) - wanted;
            const F kept = (F)((I)error & (error == error));
            memcpy(lost + e, &kept, (size_t)here * sizeof(float));
        }
        memcpy(results + e, &total, (size_t)here * sizeof(float));
    }
}

// Products whose results are adjacent, in order.
struct Batch {
    alignas(64) float sums[BATCH * LANES];
    int64_t n;
    float *results, *lost;

    Batch(float* to, float* losses) : n(0), results(to), lost(losses) {}

    void flush() {
        for (int64_t i = n * LANES; i % (LANES * LANES); ++i) sums[i] = 0; // lanes are added up LANES products at a time
        add_lanes(sums, n, results, lost);
        results += n;
        if (lost) lost += n;
        n = 0;
    }

    // The products of `first` with the runs that begin at second + at[which[i]].
    void add(const Walk& walk, const float* first, const float* second, const int64_t* at, const int32_t* which,
             int64_t count) {
        for (int64_t e = 0; e < count;) {
            if (n == BATCH) flush();
            const float* runs[4];
            const int64_t here = least(count - e, BATCH - n) >= 4 ? 4 : 1;
            for (int64_t i = 0; i < here; ++i) runs[i] = second + at[which[e + i]];
            if (here == 4)
                multiply<4>(walk, first, runs, sums + n * LANES);
            else
                multiply<1>(walk, first, runs, sums + n * LANES);
            e += here;
            n += here;
        }
    }
};

} // namespace
