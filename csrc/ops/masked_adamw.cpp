// masked_adamw_ and scatter_values_ (fps_kernels/ops/reference.py): one call for all tensors.
//
// What costs is not the arithmetic but the cache misses: one line of the gradient and one of the weight per entry. Bytes
// that must move per entry: two lines read, one written back, and 28 of compact state.
#include "parts/entries.h"

namespace {

using fps::AdamW;
using fps::Entries;
using fps::Update;

// What the formula needs of one tensor, rounded to float32 as torch does with Python's numbers.
struct Scalars {
    float decay;     // 1 - lr * weight_decay
    float step_size; // -lr / (1 - beta1^step)
    float root;      // sqrt(1 - beta2^step)
    float eps, beta1, beta2, one_minus_beta1, one_minus_beta2;
    float grad_scale;
    bool scaled, maximize, zero_grads;
};

Scalars scalars_of(const AdamW& how, int64_t tensor, double step) {
    const double lr = how.lrs[tensor];
    return {(float)(1 - lr * how.weight_decays[tensor]),
            (float)(-lr / (1 - __builtin_pow(how.beta1, step))),
            (float)__builtin_sqrt(1 - __builtin_pow(how.beta2, step)),
            (float)how.eps,
            (float)how.beta1,
            (float)how.beta2,
            (float)(1 - how.beta1),
            (float)(1 - how.beta2),
            how.grad_scale ? *how.grad_scale : 1.0f,
            how.grad_scale != nullptr,
            how.maximize != 0,
            how.zero_grads != 0};
}

// Where the entries of one block lie.
struct Places {
    int64_t weight[BLOCK], grad[BLOCK];
};

// Notes where the next n entries lie and asks for their cache lines.
template <class TW, class TG> void look_ahead(Walk* walk, const Update& u, int64_t n, Places* places) {
    const TW* weight = (const TW*)u.entries.weight;
    const TG* grad = (const TG*)u.grad;
    walk->next(n, [&](int64_t i, int64_t row, int64_t col) {
        places->weight[i] = row * u.entries.row_stride + col * u.entries.col_stride;
        ask_for<WRITE>(weight + places->weight[i]);
        if (!u.grad_compact) {
            places->grad[i] = row * u.grad_row_stride + col * u.grad_col_stride;
            ask_for<READ>(grad + places->grad[i]);
        }
    });
}

// The update of n entries, in the order of operations of torch.optim.AdamW for a single tensor. The scalars come by value:
// a reference to floats could alias what is stored here, and the loop would not be vectorised.
template <bool FROM_END>
void adamw(const Scalars s, int64_t n, const float* __restrict grad, float* __restrict value, float* __restrict exp_avg,
           float* __restrict exp_avg_sq) {
    for (int64_t i = 0; i < n; ++i) {
        const float g = grad[i], m = exp_avg[i];
        const float mean = FROM_END ? g - (g - m) * (1.0f - s.one_minus_beta1) : m + s.one_minus_beta1 * (g - m);
        const float square = exp_avg_sq[i] * s.beta2 + s.one_minus_beta2 * g * g;
        const float denominator = __builtin_sqrtf(square) / s.root + s.eps;
        exp_avg[i] = mean;
        exp_avg_sq[i] = square;
        value[i] = value[i] * s.decay + s.step_size * mean / denominator;
    }
}

// Sets the gradients of the n entries from `at` on to zero.
template <class TG> void zero_grads(bool compact, TG* grad, const Places& places, int64_t at, int64_t n) {
    if (compact)
        memset(grad + at, 0, (size_t)n * sizeof(TG));
    else
        for (int64_t i = 0; i < n; ++i) grad[places.grad[i]] = TG();
}

// What is left to do in a step that is skipped.
template <class TG> void zero_chunk(const Update& u, int64_t begin, int64_t end) {
    Places places;
    Walk walk(u.entries, begin);
    for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t n = least(BLOCK, end - at);
        if (!u.grad_compact) look_ahead<TG, TG>(&walk, u, n, &places);
        zero_grads(u.grad_compact, (TG*)u.grad, places, at, n);
    }
}

// A weight that was changed since both sides agreed counts, unless the value was as well.
template <class TW> void settle(const TW* weight, const int64_t* places, int64_t n, const float* agreed, float* value) {
    for (int64_t i = 0; i < n; ++i) {
        TW rounded;
        round_to(agreed[i], &rounded);
        const TW& held = weight[places[i]];
        if (to_bits(value[i]) == to_bits(agreed[i]) && memcmp(&rounded, &held, sizeof(TW)) != 0) value[i] = to_float(held);
    }
}

template <class TW, class TG> void update_chunk(const Update& u, const Scalars& s, int64_t begin, int64_t end) {
    TW* weight = (TW*)u.entries.weight;
    TG* from = (TG*)u.grad;
    Places places[2];
    float grad[BLOCK], local[BLOCK];
    Walk walk(u.entries, begin);
    look_ahead<TW, TG>(&walk, u, least(BLOCK, end - begin), &places[0]);
    for (int64_t at = begin, turn = 0; at < end; at += BLOCK, turn ^= 1) {
        const int64_t n = least(BLOCK, end - at);
        if (at + BLOCK < end) look_ahead<TW, TG>(&walk, u, least(BLOCK, end - at - BLOCK), &places[turn ^ 1]);
        const Places& here = places[turn];
        if (u.grad_compact)
            for (int64_t i = 0; i < n; ++i) grad[i] = to_float(from[at + i]);
        else
            for (int64_t i = 0; i < n; ++i) grad[i] = to_float(from[here.grad[i]]);
        if (s.zero_grads) zero_grads(u.grad_compact, from, here, at, n);
        if (s.scaled)
            for (int64_t i = 0; i < n; ++i) grad[i] /= s.grad_scale;
        if (s.maximize)
            for (int64_t i = 0; i < n; ++i) grad[i] = -grad[i];
        float* value = u.master ? u.master + at : local;
        if (!u.master)
            for (int64_t i = 0; i < n; ++i) local[i] = to_float(weight[here.weight[i]]);
        if (u.agreed) settle(weight, here.weight, n, u.agreed + at, value);
        if (s.one_minus_beta1 < 0.5f) // torch.lerp chooses the end that it starts from in the same way
            adamw<false>(s, n, grad, value, u.exp_avg + at, u.exp_avg_sq + at);
        else
            adamw<true>(s, n, grad, value, u.exp_avg + at, u.exp_avg_sq + at);
        for (int64_t i = 0; i < n; ++i) round_to(value[i], weight + here.weight[i]);
        if (u.agreed) memcpy(u.agreed + at, value, (size_t)n * sizeof(float));
    }
}

template <class TW, class TV> void scatter_chunk(const Entries& entries, const TV* values, int64_t begin, int64_t end) {
    TW* weight = (TW*)entries.weight;
    int64_t places[2][BLOCK];
    Walk walk(entries, begin);
    walk.look_ahead<WRITE, TW>(least(BLOCK, end - begin), places[0]);
    for (int64_t at = begin, turn = 0; at < end; at += BLOCK, turn ^= 1) {
        if (at + BLOCK < end) walk.look_ahead<WRITE, TW>(least(BLOCK, end - at - BLOCK), places[turn ^ 1]);
        const int64_t n = least(BLOCK, end - at);
        for (int64_t i = 0; i < n; ++i) round_to(to_float(values[at + i]), weight + places[turn][i]);
    }
}

} // namespace

int fps::FPS_ISA::scatter_values(const Entries& entries, const void* values, int64_t values_dtype, int threads) {
    const int64_t chunks = ceil_div(entries.nnz, CHUNK);
    return with_dtype(entries.dtype, [&](auto weight) {
        return with_dtype(values_dtype, [&](auto value) {
            typedef decltype(value) TV;
#pragma omp parallel for schedule(dynamic) if (threads > 1 && chunks > 2)
            for (int64_t c = 0; c < chunks; ++c)
                scatter_chunk<decltype(weight)>(entries, (const TV*)values, c * CHUNK, least((c + 1) * CHUNK, entries.nnz));
            return (int)OK;
        });
    });
}

int fps::FPS_ISA::masked_adamw(const Update* updates, int64_t n, const AdamW& how, int threads) {
    const bool skipped = how.found_inf && *how.found_inf != 0;
    if (skipped && !how.zero_grads) return OK;
    Scratch<Scalars> scalars(n);
    const Chunks chunks(updates, n);
    if (!scalars || !chunks) return OUT_OF_MEMORY;
    for (int64_t t = 0; t < n; ++t) {
        if (!skipped) *updates[t].step += 1;
        scalars.data[t] = scalars_of(how, t, *updates[t].step);
    }
#pragma omp parallel for schedule(dynamic) if (threads > 1 && chunks.count > 2)
    for (int64_t c = 0; c < chunks.count; ++c) {
        const Chunk chunk = chunks[c];
        const Update& u = updates[chunk.tensor];
        const Scalars& s = scalars.data[chunk.tensor];
        with_dtype(u.entries.dtype, [&](auto weight) {
            return with_dtype(u.grad_dtype, [&](auto grad) {
                if (skipped)
                    zero_chunk<decltype(grad)>(u, chunk.begin, chunk.end);
                else
                    update_chunk<decltype(weight), decltype(grad)>(u, s, chunk.begin, chunk.end);
                return (int)OK;
            });
        });
    }
    return OK;
}
