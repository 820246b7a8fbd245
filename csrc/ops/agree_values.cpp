// agree_values_ (fps_kernels/ops/reference.py): one call for all tensors.
//
// It is called in every forward pass, where as a rule nothing has changed. Then nothing is written, so that no cache line
// becomes dirty. Bytes that must move per entry: one line of the weight, and 12 of its column, its value and what was
// agreed.
#include "parts/entries.h"

namespace {

using fps::Agreement;

inline uint32_t bits_of(float x) { return to_bits(x); }
inline uint32_t bits_of(bf16 x) { return x.bits; }
inline uint32_t bits_of(f16 x) { return x.bits; }

template <class TW> inline uint32_t rounded_bits(float x) {
    TW rounded;
    round_to(x, &rounded);
    return bits_of(rounded);
}

template <class TW> void agree(TW* weight, float* value, float* agreed) {
    const uint32_t before = bits_of(*agreed);
    if (bits_of(*value) != before) {
        round_to(*value, weight);
        *agreed = *value;
    } else if (bits_of(*weight) != rounded_bits<TW>(*agreed)) {
        const float held = to_float(*weight);
        if (bits_of(held) != before) *value = *agreed = held; // rounding does not give back every NaN
    }
}

template <class TW> void agree_chunk(const Agreement& a, int64_t begin, int64_t end) {
    TW* weight = (TW*)a.entries.weight;
    int64_t places[2][BLOCK];
    Walk walk(a.entries, begin);
    walk.look_ahead<READ, TW>(least(BLOCK, end - begin), places[0]);
    for (int64_t at = begin, turn = 0; at < end; at += BLOCK, turn ^= 1) {
        if (at + BLOCK < end) walk.look_ahead<READ, TW>(least(BLOCK, end - at - BLOCK), places[turn ^ 1]);
        const int64_t n = least(BLOCK, end - at);
        float *values = a.values + at, *agreed = a.agreed + at;
        const int64_t* here = places[turn];
        uint32_t differ = 0;
        for (int64_t i = 0; i < n; ++i)
            differ |= (bits_of(values[i]) ^ bits_of(agreed[i])) | (bits_of(weight[here[i]]) ^ rounded_bits<TW>(agreed[i]));
        if (differ != 0)
            for (int64_t i = 0; i < n; ++i) agree(weight + here[i], values + i, agreed + i);
    }
}

} // namespace

int fps::FPS_ISA::agree_values(const Agreement* agreements, int64_t n, int threads) {
    const Chunks chunks(agreements, n);
    if (!chunks) return OUT_OF_MEMORY;
#pragma omp parallel for schedule(dynamic) if (threads > 1 && chunks.count > 2)
    for (int64_t c = 0; c < chunks.count; ++c) {
        const Chunk chunk = chunks[c];
        const Agreement& a = agreements[chunk.tensor];
        with_dtype(a.entries.dtype, [&](auto weight) {
            agree_chunk<decltype(weight)>(a, chunk.begin, chunk.end);
            return (int)OK;
        });
    }
    return OK;
}
