// Vectors as the rows of a small matrix: its transpose, and the sums of its rows.
//
// Both are made of the same steps: pairs of lanes, pairs of pairs, and blocks of four lanes.
#pragma once

#include "parts/simd.h"

namespace {

#if defined(FPS_ISA_avx512)

inline F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); } // a * b + c
inline F low_lanes(F a, F b) { return (F)_mm512_unpacklo_ps((__m512)a, (__m512)b); }          // a0 b0 a1 b1 of every block
inline F high_lanes(F a, F b) { return (F)_mm512_unpackhi_ps((__m512)a, (__m512)b); }         // a2 b2 a3 b3
inline F low_pairs(F a, F b) { return (F)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }        // a0 a1 b0 b1
inline F high_pairs(F a, F b) { return (F)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }       // a2 a3 b2 b3
inline F even_blocks(F a, F b) { return (F)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88); }
inline F odd_blocks(F a, F b) { return (F)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd); }

#elif defined(FPS_ISA_avx2)

inline F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline F low_lanes(F a, F b) { return (F)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
inline F high_lanes(F a, F b) { return (F)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
inline F low_pairs(F a, F b) { return (F)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
inline F high_pairs(F a, F b) { return (F)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
inline F even_blocks(F a, F b) { return (F)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20); }
inline F odd_blocks(F a, F b) { return (F)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31); }

#else

inline F fused(F a, F b, F c) { return a * b + c; } // two roundings
inline F low_lanes(F a, F b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline F high_lanes(F a, F b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
inline F low_pairs(F a, F b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
inline F high_pairs(F a, F b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }

#endif

// Transposes LANES vectors.
inline void transpose(F* v) {
    for (int i = 0; i < LANES; i += 4) { // every block of four lanes
        const F a = low_lanes(v[i], v[i + 1]), b = high_lanes(v[i], v[i + 1]);
        const F c = low_lanes(v[i + 2], v[i + 3]), d = high_lanes(v[i + 2], v[i + 3]);
        v[i] = low_pairs(a, c);
        v[i + 1] = high_pairs(a, c);
        v[i + 2] = low_pairs(b, d);
        v[i + 3] = high_pairs(b, d);
    }
#if defined(FPS_ISA_avx512)
    for (int i = 0; i < 4; ++i) { // the blocks themselves
        const F a = even_blocks(v[i], v[i + 4]), b = odd_blocks(v[i], v[i + 4]);
        const F c = even_blocks(v[i + 8], v[i + 12]), d = odd_blocks(v[i + 8], v[i + 12]);
        v[i] = even_blocks(a, c);
        v[i + 4] = even_blocks(b, d);
        v[i + 8] = odd_blocks(a, c);
        v[i + 12] = odd_blocks(b, d);
    }
#elif defined(FPS_ISA_avx2)
    for (int i = 0; i < 4; ++i) {
        const F a = v[i], b = v[i + 4];
        v[i] = even_blocks(a, b);
        v[i + 4] = odd_blocks(a, b);
    }
#endif
}

// Lane i of the result is made of the lanes of row(i), in pairs, by both(one, another).
template <class Row, class Both> inline F combine_rows(Row row, Both both) {
    F made[LANES / 4];
    for (int i = 0; i < LANES / 4; ++i) { // four rows: block b of the result holds what is made of their blocks b
        const F a = row(4 * i), b = row(4 * i + 1), c = row(4 * i + 2), d = row(4 * i + 3);
        const F ab = both(low_lanes(a, b), high_lanes(a, b)), cd = both(low_lanes(c, d), high_lanes(c, d));
        made[i] = both(low_pairs(ab, cd), high_pairs(ab, cd));
    }
#if defined(FPS_ISA_avx512)
    const F low = both(even_blocks(made[0], made[1]), odd_blocks(made[0], made[1]));
    const F high = both(even_blocks(made[2], made[3]), odd_blocks(made[2], made[3]));
    return both(even_blocks(low, high), odd_blocks(low, high));
#elif defined(FPS_ISA_avx2)
    return both(even_blocks(made[0], made[1]), odd_blocks(made[0], made[1]));
#else
    return made[0];
#endif
}

// Lane i of the result is the sum of the LANES numbers from rows[i * LANES] on.
inline F sum_rows(const float* rows) {
    return combine_rows([&](int i) { return load(rows + i * LANES); }, [](F a, F b) { return a + b; });
}

} // namespace
