// pack_groups and unpack_groups (fps_kernels/ops/reference.py): one read and one write, at the speed of memory.
//
// Numbers are taken a block of LANES groups at a time, so that minima and steps of a whole block are made in one vector. A
// block that holds NaN, infinity or a range beyond float32 is done again, number by number. What does not lie one behind the
// other is copied together first, a block at a time. Scratch: 5 KiB per thread.
#include "parts/lanes.h"
#include "parts/rows.h"

namespace {

constexpr int GROUP = 32;
constexpr int GROUPS = LANES; // of a block
constexpr int BLOCK = GROUP * GROUPS;
constexpr int VECTORS = GROUP / LANES; // of a group
constexpr int64_t CHUNK_BLOCKS = 64;   // that one thread takes at a time
constexpr float SMALLEST_STEP = 0x1p-126f;

typedef uint32_t U __attribute__((vector_size(4 * LANES), may_alias));
typedef uint64_t Q __attribute__((vector_size(4 * LANES), may_alias));

#if defined(FPS_ISA_avx512)
inline F smaller(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
inline F larger(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(FPS_ISA_avx2)
inline F smaller(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
inline F larger(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
#else
inline F smaller(F a, F b) { return a < b ? a : b; }
inline F larger(F a, F b) { return a > b ? a : b; }
#endif

// The nearest bfloat16 that is not above, or not below.
inline F rounded_down(F v) { return (F)(((I)v + (((I)v >> 31) & 0xffff)) & ~0xffff); }
inline F rounded_up(F v) { return (F)(((I)v + 0xffff) & ~0xffff); } // of positive numbers

// ---------------------------------------------------------------------------------------------- what is added before
// rounding

struct Nearest {
    F of(int64_t) const { return broadcast(0.5f); }
};

// A hash of the key and the position: MurmurHash3's finalizer, twice.
struct Stochastic {
    uint32_t key;

    static U mixed(U h) {
        h = (h ^ h >> 16) * 0x85ebca6b;
        h = (h ^ h >> 13) * 0xc2b2ae35;
        return h ^ h >> 16;
    }
    F of(int64_t position) const {
        const U place = (U)iota() + (uint32_t)position;
        const I h = (I)(mixed(mixed(place) + key) >> 8);
        return __builtin_convertvector(h, F) * 0x1p-24f;
    }
};

// ---------------------------------------------------------------------------------------------- one block

// The lanes as bytes, those above 255 as 255, and back. What compilers make of __builtin_convertvector takes several times
// as long.
#if defined(FPS_ISA_avx512)
inline void store_bytes(uint8_t* p, I v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8((__m512i)v)); }
inline void store_bytes(uint8_t* p, Q v) { _mm_storel_epi64((__m128i*)p, _mm512_cvtepi64_epi8((__m512i)v)); }
inline I load_bytes(const uint8_t* p) { return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline Q load_half_bytes(const uint8_t* p) { return (Q)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p)); }
#elif defined(FPS_ISA_avx2)
inline void store_bytes(uint8_t* p, I v) {
    const __m128i shorts = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(shorts, shorts));
}
inline void store_bytes(uint8_t* p, Q v) {
    const __m128i ints = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    const __m128i shorts = _mm_packus_epi32(ints, ints);
    const int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(shorts, shorts));
    memcpy(p, &four, 4);
}
inline I load_bytes(const uint8_t* p) { return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline Q load_half_bytes(const uint8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return (Q)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
}
#else
inline void store_bytes(uint8_t* p, I v) {
    for (int i = 0; i < LANES; ++i) p[i] = (uint8_t)(v[i] < 255 ? v[i] : 255);
}
inline void store_bytes(uint8_t* p, Q v) {
    for (int i = 0; i < LANES / 2; ++i) p[i] = (uint8_t)v[i];
}
inline I load_bytes(const uint8_t* p) {
    I v;
    for (int i = 0; i < LANES; ++i) v[i] = p[i];
    return v;
}
inline Q load_half_bytes(const uint8_t* p) {
    Q v;
    for (int i = 0; i < LANES / 2; ++i) v[i] = p[i];
    return v;
}
#endif

template <int BITS> struct Codes;
template <> struct Codes<8> {
    static constexpr int MOST = 255;
    static void store(uint8_t* codes, int at, I v) { store_bytes(codes + at, v); }
    static I load(const uint8_t* codes, int at) { return load_bytes(codes + at); }
};
template <> struct Codes<4> { // neighbours share a byte, the first one in its lower half
    static constexpr int MOST = 15;
    static void store(uint8_t* codes, int at, I v) {
        v = min(v, broadcast((int32_t)MOST));
        const Q pairs = (Q)v | (Q)v >> 28;
        store_bytes(codes + at / 2, pairs & 0xff);
    }
    static I load(const uint8_t* codes, int at) {
        const Q pairs = load_half_bytes(codes + at / 2);
        return (I)((pairs | pairs << 28) & 0x0000000f0000000f);
    }
};

struct Scales { // minima and steps of a block's groups, and their rounded reciprocals
    float minima[GROUPS], steps[GROUPS], inverses[GROUPS];
};

// Whether all is finite; otherwise the scales mean nothing.
template <int MOST, class T> bool find_scales(const T* x, Scales* s) {
    F low[GROUPS], high[GROUPS], zeros[4] = {}; // several, so that none waits for the one before
    for (int g = 0; g < GROUPS; ++g) {
        F v = load(x + g * GROUP);
        low[g] = high[g] = v;
        zeros[g % 2] = fused(v, F{}, zeros[g % 2]); // NaN as soon as one is not finite
        for (int i = 1; i < VECTORS; ++i) {
            v = load(x + g * GROUP + i * LANES);
            low[g] = smaller(low[g], v);
            high[g] = larger(high[g], v);
            zeros[2 + i % 2] = fused(v, F{}, zeros[2 + i % 2]);
        }
    }
    F zero = (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]);
    const F minimum = rounded_down(combine_rows([&](int g) { return low[g]; }, smaller) + 0.0f);
    const F spread = combine_rows([&](int g) { return high[g]; }, larger) - minimum;
    zero += spread * 0.0f;
    const F step = rounded_up(larger(spread * (1.0f / MOST), broadcast(SMALLEST_STEP)));
    store_vector(s->minima, minimum);
    store_vector(s->steps, step);
    store_vector(s->inverses, 1.0f / step);
    return count((Mask)(gt((I)absolute(zero), I{}))) == 0;
}

// The same one by one. A group that cannot be packed has a minimum that is NaN and codes that are 0.
template <int MOST, class T> void find_scales_again(const T* x, Scales* s) {
    for (int g = 0; g < GROUPS; ++g) {
        float low = to_float(x[g * GROUP]), high = low, zero = 0;
        for (int i = 0; i < GROUP; ++i) {
            const float v = to_float(x[g * GROUP + i]);
            low = v < low ? v : low;
            high = v > high ? v : high;
            zero += v * 0.0f;
        }
        const uint32_t bits = to_bits(low + 0.0f);
        const float minimum = from_bits((bits + (bits >> 31) * 0xffff) & 0xffff0000), spread = high - minimum;
        const float least = spread * (1.0f / MOST);
        const float step = from_bits((to_bits(least < SMALLEST_STEP ? SMALLEST_STEP : least) + 0xffff) & 0xffff0000);
        const bool fits = zero + spread * 0.0f == 0.0f;
        s->minima[g] = fits ? minimum : from_bits(0x7fc00000);
        s->steps[g] = fits ? step : 0.0f;
        s->inverses[g] = fits ? 1.0f / step : 0.0f;
    }
}

template <int BITS, class Rounding, class T>
void pack_block(const T* x, int64_t position, const Rounding& rounding, uint8_t* codes, uint16_t* scales) {
    constexpr int MOST = Codes<BITS>::MOST;
    Scales s;
    const bool ordinary = find_scales<MOST>(x, &s);
    if (!ordinary) find_scales_again<MOST>(x, &s);
    for (int g = 0; g < GROUPS; ++g) {
        scales[2 * g] = (uint16_t)(to_bits(s.minima[g]) >> 16);
        scales[2 * g + 1] = (uint16_t)(to_bits(s.steps[g]) >> 16);
    }
    for (int g = 0; g < GROUPS; ++g) {
        const F minimum = broadcast(s.minima[g]), inverse = broadcast(s.inverses[g]);
        for (int i = 0; i < VECTORS; ++i) {
            const int at = g * GROUP + i * LANES;
            F scaled = (load(x + at) - minimum) * inverse + rounding.of(position + at);
            if (!ordinary) scaled = scaled == scaled ? scaled : F{};
            Codes<BITS>::store(codes, at, __builtin_convertvector(scaled, I));
        }
    }
}

// ---------------------------------------------------------------------------------------------- all of them

// Results of so many bytes go past the caches, which would have to read them first. Codes are asked for in the backward pass
// at the earliest; what is unpacked is asked for next, and is written there only if no cache would hold it.
constexpr int64_t MANY_CODES = 1 << 20, MANY_NUMBERS = 1 << 26;

// `size` bytes, a multiple of 64, from an aligned place to another one.
inline void stream(uint8_t* to, const uint8_t* from, int size) {
#if defined(FPS_ISA_avx512)
    for (int i = 0; i < size; i += 64) _mm512_stream_si512((__m512i*)(to + i), _mm512_load_si512(from + i));
#elif defined(FPS_ISA_avx2)
    for (int i = 0; i < size; i += 32)
        _mm256_stream_si256((__m256i*)(to + i), _mm256_load_si256((const __m256i*)(from + i)));
#elif defined(__SSE2__)
    for (int i = 0; i < size; i += 16) _mm_stream_si128((__m128i*)(to + i), _mm_load_si128((const __m128i*)(from + i)));
#else
    memcpy(to, from, (size_t)size);
#endif
}

inline void end_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Copies `n` numbers together from the position `begin` on.
template <class T> void gather(const fps::Numbers& x, int64_t begin, int64_t n, T* to) {
    int64_t at[4];
    for (int d = 3; d >= 0; --d) {
        at[d] = begin % x.sizes[d];
        begin /= x.sizes[d];
    }
    while (n > 0) {
        const T* from = (const T*)x.data + at[0] * x.strides[0] + at[1] * x.strides[1] + at[2] * x.strides[2];
        const int64_t run = least(n, x.sizes[3] - at[3]), step = x.strides[3];
        if (step == 1) {
            memcpy(to, from + at[3], (size_t)run * sizeof(T));
        } else {
            for (int64_t i = 0; i < run; ++i) to[i] = from[(at[3] + i) * step];
        }
        to += run;
        n -= run;
        at[3] = 0;
        for (int d = 2; d >= 0 && ++at[d] == x.sizes[d]; --d) at[d] = 0;
    }
}

template <int BITS, class Rounding, class T>
int pack_all(const fps::Numbers& x, const Rounding& rounding, uint8_t* codes, uint16_t* scales, int threads) {
    const int64_t n = x.sizes[0] * x.sizes[1] * x.sizes[2] * x.sizes[3], blocks = ceil_div(n, BLOCK);
    const bool dense = n == x.sizes[3] && x.strides[3] == 1;
    constexpr int BYTES = BLOCK * BITS / 8;
    const bool streams = BYTES % 64 == 0 && n * BITS / 8 >= MANY_CODES && (uintptr_t)codes % 64 == 0;
#pragma omp parallel for schedule(static) if (threads > 1 && n > WORTH_THREADS)
    for (int64_t chunk = 0; chunk < ceil_div(blocks, CHUNK_BLOCKS); ++chunk) {
        T copied[BLOCK];
        alignas(64) uint8_t made[BYTES];
        for (int64_t b = chunk * CHUNK_BLOCKS; b < least((chunk + 1) * CHUNK_BLOCKS, blocks); ++b) {
            const int64_t begin = b * BLOCK, size = least(BLOCK, n - begin);
            const T* numbers = (const T*)x.data + begin;
            uint8_t* to = codes + begin * BITS / 8;
            uint16_t* scales_to = scales + 2 * b * GROUPS;
            if (!dense || size < BLOCK) {
                gather(x, begin, size, copied);
                for (int64_t i = size; i < BLOCK; ++i) copied[i] = copied[size - 1]; // changes no minimum and no maximum
                numbers = copied;
            }
            if (size == BLOCK && streams) {
                pack_block<BITS>(numbers, begin, rounding, made, scales_to);
                stream(to, made, BYTES);
            } else if (size == BLOCK) {
                pack_block<BITS>(numbers, begin, rounding, to, scales_to);
            } else {
                uint8_t* last = made;
                uint16_t last_scales[2 * GROUPS];
                pack_block<BITS>(numbers, begin, rounding, last, last_scales);
                if (BITS == 4 && size % 2 != 0) last[size / 2] &= 15;
                memcpy(to, last, (size_t)ceil_div(size * BITS, 8));
                memcpy(scales_to, last_scales, (size_t)ceil_div(size, GROUP) * 2 * sizeof(uint16_t));
            }
        }
        if (streams) end_streams();
    }
    return fps::OK;
}

template <int BITS, class T>
int pack_with(const fps::Numbers& x, int64_t key, uint8_t* codes, uint16_t* scales, int threads) {
    if (key < 0) return pack_all<BITS, Nearest, T>(x, Nearest(), codes, scales, threads);
    const Stochastic rounding = {(uint32_t)key};
    return pack_all<BITS, Stochastic, T>(x, rounding, codes, scales, threads);
}

// ---------------------------------------------------------------------------------------------- back

inline float largest(float) { return 0x1.fffffep127f; }
inline float largest(bf16) { return 0x1.fep127f; }
inline float largest(f16) { return 65504.0f; }

inline void store(float* p, F v) { store_vector(p, v); }
inline void store(bf16* p, F v) { // finite, or the one NaN that packing makes
    const U bits = (U)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#if defined(FPS_ISA_avx512)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)rounded));
#elif defined(FPS_ISA_avx2)
    const __m256i pairs = (__m256i)rounded;
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128((__m128i*)p, halves);
#else
    store_vector(p, __builtin_convertvector(rounded, H));
#endif
}
#if defined(FPS_ISA_avx512)
inline void store(f16* p, F v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(FPS_ISA_avx2)
inline void store(f16* p, F v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline void store(f16* p, F v) {
    for (int i = 0; i < LANES; ++i) round_to(v[i], p + i);
}
#endif

template <int BITS, class T> inline void unpack_group(const uint8_t* codes, const uint16_t* scale, T* out) {
    const F minimum = broadcast(from_bits((uint32_t)scale[0] << 16)), step = broadcast(from_bits((uint32_t)scale[1] << 16));
    const F most = broadcast(largest(T()));
    for (int i = 0; i < GROUP; i += LANES) {
        const F v = minimum + __builtin_convertvector(Codes<BITS>::load(codes, i), F) * step;
        store(out + i, larger(-most, smaller(most, v))); // which are the latter where one is NaN
    }
}

template <int BITS, class T> int unpack_all(const uint8_t* codes, const uint16_t* scales, T* out, int64_t n, int threads) {
    const int64_t blocks = ceil_div(n, BLOCK);
    const bool streams = n * (int64_t)sizeof(T) >= MANY_NUMBERS && (uintptr_t)out % 64 == 0;
#pragma omp parallel for schedule(static) if (threads > 1 && n > WORTH_THREADS)
    for (int64_t chunk = 0; chunk < ceil_div(blocks, CHUNK_BLOCKS); ++chunk) {
        alignas(64) T made[BLOCK];
        for (int64_t b = chunk * CHUNK_BLOCKS; b < least((chunk + 1) * CHUNK_BLOCKS, blocks); ++b) {
            const int64_t begin = b * BLOCK, size = least(BLOCK, n - begin);
            const uint8_t* from = codes + begin * BITS / 8;
            T* to = streams ? made : out + begin;
            for (int64_t g = 0; g < size / GROUP; ++g)
                unpack_group<BITS>(from + g * GROUP * BITS / 8, scales + 2 * (b * GROUPS + g), to + g * GROUP);
            if (const int64_t rest = size % GROUP, at = size - rest; rest != 0) {
                uint8_t last[GROUP] = {};
                T numbers[GROUP];
                memcpy(last, from + at * BITS / 8, (size_t)ceil_div(rest * BITS, 8));
                unpack_group<BITS>(last, scales + 2 * (b * GROUPS + at / GROUP), numbers);
                memcpy(to + at, numbers, (size_t)rest * sizeof(T));
            }
            if (streams && size == BLOCK)
                stream((uint8_t*)(out + begin), (const uint8_t*)made, sizeof(made));
            else if (streams)
                memcpy(out + begin, made, (size_t)size * sizeof(T));
        }
        if (streams) end_streams();
    }
    return fps::OK;
}

} // namespace

int fps::FPS_ISA::pack_groups(const Numbers& x, int64_t bits, int64_t key, uint8_t* codes, uint16_t* scales, int threads) {
    return with_dtype(x.dtype, [&](auto element) {
        typedef decltype(element) T;
        return bits == 8 ? pack_with<8, T>(x, key, codes, scales, threads) : pack_with<4, T>(x, key, codes, scales, threads);
    });
}

int fps::FPS_ISA::unpack_groups(const uint8_t* codes, const uint16_t* scales, int64_t bits, void* out, int64_t n,
                                int64_t dtype, int threads) {
    return with_dtype(dtype, [&](auto element) {
        typedef decltype(element) T;
        return bits == 8 ? unpack_all<8, T>(codes, scales, (T*)out, n, threads)
                         : unpack_all<4, T>(codes, scales, (T*)out, n, threads);
    });
}
