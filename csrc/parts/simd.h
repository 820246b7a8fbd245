// One vector of float32 or int32 lanes on every instruction set, and how each dtype is loaded into it.
//
// Everything lives in an anonymous namespace: these headers are compiled for several instruction sets into one library.
// A `Mask` is a plain integer with one bit per lane.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

typedef uint32_t Mask;

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

#if defined(FPS_ISA_avx512)
constexpr int LANES = 16;
#elif defined(FPS_ISA_avx2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float F __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t I __attribute__((vector_size(4 * LANES), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * LANES), may_alias));

template <class V, class P> inline V load_vector(const P* p) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}
template <class V, class P> inline void store_vector(P* p, V v) { memcpy(p, &v, sizeof(V)); }

inline I load_ints(const int32_t* p) { return load_vector<I>(p); }
inline F broadcast(float x) { return x - F{}; }
inline I broadcast(int32_t x) { return x - I{}; }

inline I iota() {
    I v;
    for (int i = 0; i < LANES; ++i) v[i] = i;
    return v;
}

#if defined(FPS_ISA_avx512)

inline I min(I a, I b) { return (I)_mm512_min_epi32((__m512i)a, (__m512i)b); }
inline I max(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline Mask gt(I a, I b) { return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b); }
inline Mask eq(I a, I b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
inline int32_t max_lane(I v) { return _mm512_reduce_max_epi32((__m512i)v); }
inline int count(Mask m) { return __builtin_popcount(m); }

// The lanes in `m`, packed; writes LANES elements, of which the first count(m) mean something. The form of the
// instruction that writes to memory is avoided: some processors need over a hundred cycles for it.
inline int compress(int32_t* to, Mask m, I v) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)m, (__m512i)v));
    return count(m);
}

inline F load(const f16* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

#elif defined(FPS_ISA_avx2)

inline I min(I a, I b) { return (I)_mm256_min_epi32((__m256i)a, (__m256i)b); }
inline I max(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline Mask gt(I a, I b) { return _mm256_movemask_ps((__m256)_mm256_cmpgt_epi32((__m256i)a, (__m256i)b)); }
inline Mask eq(I a, I b) { return _mm256_movemask_ps((__m256)_mm256_cmpeq_epi32((__m256i)a, (__m256i)b)); }
inline int count(Mask m) { return __builtin_popcount(m); }
inline int32_t max_lane(I v) {
    int32_t most = v[0];
    for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

struct Permutations {
    uint64_t of[256]; // for each mask the lanes in it, one byte per lane
    constexpr Permutations() : of() {
        for (int mask = 0; mask < 256; ++mask) {
            int to = 0;
            for (int lane = 0; lane < 8; ++lane)
                if (mask >> lane & 1) of[mask] |= (uint64_t)lane << 8 * to++;
        }
    }
};
constexpr Permutations PERMUTATIONS;

inline int compress(int32_t* to, Mask m, I v) {
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)PERMUTATIONS.of[m]));
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32((__m256i)v, lanes));
    return count(m);
}

inline F load(const f16* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

#else

inline I min(I a, I b) { return a < b ? a : b; }
inline I max(I a, I b) { return a > b ? a : b; }
inline Mask to_mask(I v) {
#if defined(__SSE2__)
    return _mm_movemask_ps((__m128)v);
#else
    Mask m = 0;
    for (int i = 0; i < LANES; ++i) m |= (Mask)(v[i] & 1) << i;
    return m;
#endif
}
inline Mask gt(I a, I b) { return to_mask(a > b); }
inline Mask eq(I a, I b) { return to_mask(a == b); }
inline int count(Mask m) {
    static const uint8_t bits[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
    return bits[m];
}
inline int32_t max_lane(I v) {
    int32_t most = v[0];
    for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
    return most;
}
inline int compress(int32_t* to, Mask m, I v) {
    int n = 0;
    for (; m; m &= m - 1) to[n++] = v[__builtin_ctz(m)];
    return n;
}

// Exact for every float16, denormals included: the exponent is shifted by multiplying with a power of two.
inline F load(const f16* p) {
    const I half = __builtin_convertvector(load_vector<H>(p), I);
    const I magnitude = (half & 0x7fff) << 13;
    I bits = (I)((F)magnitude * 0x1p112f);
    bits |= ((half & 0x7c00) == 0x7c00) & 0x7f800000; // infinity and NaN keep their mantissa
    return (F)(bits | (half & 0x8000) << 16);
}

#endif

inline F load(const float* p) { return load_vector<F>(p); }
inline F load(const bf16* p) { return (F)(__builtin_convertvector(load_vector<H>(p), I) << 16); }

// The first n < LANES elements, then zeros, without reading past them.
template <class T> inline F load_first(const T* p, int64_t n) {
    T padded[LANES] = {};
    memcpy(padded, p, (size_t)n * sizeof(T));
    return load(padded);
}

#if defined(FPS_ISA_avx512)
inline F load_first(const float* p, int64_t n) { return (F)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline F load_first(const bf16* p, int64_t n) {
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p)), 16);
}
#endif

inline F absolute(F v) { return (F)((I)v & 0x7fffffff); }

// ---------------------------------------------------------------------------------------------- one element

inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return from_bits((uint32_t)x.bits << 16); }
inline float to_float(f16 x) {
    uint32_t bits = to_bits(from_bits((uint32_t)(x.bits & 0x7fff) << 13) * 0x1p112f);
    if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    return from_bits(bits | (uint32_t)(x.bits & 0x8000) << 16);
}

// Rounding to nearest, ties to even, in integers: the same bits on every instruction set.
inline void round_to(float x, float* to) { *to = x; }
inline void round_to(float x, bf16* to) {
    const uint32_t bits = to_bits(x);
    to->bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void round_to(float x, f16* to) {
    const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;
    } else if (magnitude >= 0x477ff000) { // rounds to 65536 or more
        half = 0x7c00;
    } else if (magnitude >= 0x38800000) {
        half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else { // denormal: adding 0.5 lets the adder itself round at bit 2^-24
        half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    }
    to->bits = (uint16_t)(sign | half);
}

// Calls `fn` with a value of the C++ type of a dtype code.
template <class Fn> inline int with_dtype(int64_t dtype, Fn fn) {
    switch (dtype) {
    case 0: return fn(float());
    case 1: return fn(bf16());
    case 2: return fn(f16());
    default: return 3; // WRONG_DTYPE
    }
}

} // namespace
