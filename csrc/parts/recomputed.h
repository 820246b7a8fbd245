// Planes of an input that is not in memory: it is computed again, run by run, from what the operation that made it keeps.
#pragma once

#include "parts/lanes.h"

namespace {

using fps::LinearGradients;
using fps::Recomputed;

inline F select(I mask, F yes, F no) { return (F)(((I)yes & mask) | ((I)no & ~mask)); }

// e^x, within 2 units in the last place, for x below 88; smaller than 2^-125 becomes that.
inline F exponential(F x) {
    const F least = broadcast(-86.6f), magic = broadcast(12582912.0f); // 1.5 * 2^23: its sum is rounded to a whole number
    x = select(x < least, least, x);
    const F shifted = fused(x, broadcast(1.44269504f), magic), n = shifted - magic;
    F r = fused(n, broadcast(-0.693359375f), x);
    r = fused(n, broadcast(2.12194440e-4f), r);
    F p = broadcast(1.9875691500e-4f); // Cephes, expf
    p = fused(p, r, broadcast(1.3981999507e-3f));
    p = fused(p, r, broadcast(8.3334519073e-3f));
    p = fused(p, r, broadcast(4.1665795894e-2f));
    p = fused(p, r, broadcast(1.6666665459e-1f));
    p = fused(p, r, broadcast(5.0000001201e-1f));
    p = fused(p, r * r, r + 1.0f);
    return (F)((I)p + (((I)shifted - (I)magic) << 23));
}

// x Phi(x). Of a negative x the small tail itself is computed: 1 + erf would cancel. erfc by Numerical Recipes, section 6.2,
// relative error 1.2e-7.
inline F gelu(F x) {
    const F z = absolute(x) * 0.70710678f, t = 1.0f / fused(z, broadcast(0.5f), broadcast(1.0f));
    F p = broadcast(0.17087277f);
    p = fused(p, t, broadcast(-0.82215223f));
    p = fused(p, t, broadcast(1.48851587f));
    p = fused(p, t, broadcast(-1.13520398f));
    p = fused(p, t, broadcast(0.27886807f));
    p = fused(p, t, broadcast(-0.18628806f));
    p = fused(p, t, broadcast(0.09678418f));
    p = fused(p, t, broadcast(0.37409196f));
    p = fused(p, t, broadcast(1.00002368f));
    p = fused(p, t, broadcast(-1.26551223f));
    const F tail = 0.5f * t * exponential(fused(-z, z, p));
    return x * select(x < 0.0f, tail, 1.0f - tail);
}

// x / (1 + e^-2u), which is x (1 + tanh u) / 2.
inline F gelu_tanh(F x) {
    const F u = x * fused(x * x, broadcast(0.044715f * 0.79788456f), broadcast(0.79788456f));
    F exponent = -2.0f * u;
    exponent = select(exponent > 87.0f, broadcast(87.0f), exponent);
    return x / (1.0f + exponential(exponent));
}

// The plane of channel c, n numbers that belong to rows `first` and following.
inline void recompute(const Recomputed& how, int64_t c, int64_t first, int64_t n, float* plane) {
    if (how.operation == fps::LAYER_NORM) {
        const F gamma = broadcast(how.gamma ? how.gamma[c] : 1.0f), beta = broadcast(how.beta ? how.beta[c] : 0.0f);
        for (int64_t i = 0; i < n; i += LANES) {
            const float *mean = how.mean + first + i, *scale = how.scale + first + i;
            const bool whole = i + LANES <= n;
            const F centred = load(plane + i) - (whole ? load(mean) : load_first(mean, n - i));
            const F normal = centred * (whole ? load(scale) : load_first(scale, n - i));
            store_vector(plane + i, fused(normal, gamma, beta));
        }
        return;
    }
    const bool tanh = how.operation == fps::GELU_TANH;
    for (int64_t i = 0; i < n; i += LANES) {
        const F x = load(plane + i);
        store_vector(plane + i, tanh ? gelu_tanh(x) : gelu(x));
    }
}

} // namespace
