// masked_adamw_ and scatter_values_ (fps_kernels/ops/reference.py): one call for all tensors.
//
// The entries of all tensors are cut into chunks of equal size, so that a large tensor does not keep one thread busy while
// the others wait. What costs is not the arithmetic but the cache misses: one line of the gradient and one of the weight
// per entry. Hence a chunk is worked off in blocks, and the lines of the next block are prefetched while this block is
// computed. Bytes that must move per entry: two lines read, one written back, and 28 of compact state.
#include "parts/rows.h"

namespace {

using fps::AdamW;
using fps::Update;

constexpr int64_t CHUNK = 4096; // entries of one work item
constexpr int64_t BLOCK = 256;  // entries whose lines are in flight together

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

// Goes through CSR entries in order and knows the row it is in.
struct Walk {
    const Update* u;
    int64_t entry, row;

    Walk(const Update& update, int64_t first) : u(&update), entry(first) {
        int64_t lo = 0, hi = update.rows; // the last row that begins at or before `first`
        while (hi - lo > 1) {
            const int64_t middle = lo + (hi - lo) / 2;
            if (update.row_offsets[middle] <= first)
                lo = middle;
            else
                hi = middle;
        }
        row = lo;
    }

    // Notes where the next n entries lie and asks for their cache lines, in the second-level cache: it can wait for twice as
    // many lines from memory as the first, which halves the time of a step.
    template <class TW, class TG> void look_ahead(int64_t n, Places* places) {
        const TW* weight = (const TW*)u->weight;
        const TG* grad = (const TG*)u->grad;
        for (int64_t i = 0; i < n;) {
            while (entry >= u->row_offsets[row + 1]) ++row; // also steps over empty rows
            const int64_t stop = least(n, i + u->row_offsets[row + 1] - entry);
            const int64_t weight_row = row * u->weight_row_stride, grad_row = row * u->grad_row_stride;
            for (; i < stop; ++i, ++entry) {
                const int64_t col = u->columns[entry];
                places->weight[i] = weight_row + col * u->weight_col_stride;
                __builtin_prefetch(weight + places->weight[i], 1, 2);
                if (!u->grad_compact) {
                    places->grad[i] = grad_row + col * u->grad_col_stride;
                    __builtin_prefetch(grad + places->grad[i], 0, 2);
                }
            }
        }
    }
};

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
    Walk walk(u, begin);
    for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t n = least(BLOCK, end - at);
        if (!u.grad_compact) walk.look_ahead<TG, TG>(n, &places);
        zero_grads(u.grad_compact, (TG*)u.grad, places, at, n);
    }
}

template <class TW, class TG> void update_chunk(const Update& u, const Scalars& s, int64_t begin, int64_t end) {
    TW* weight = (TW*)u.weight;
    TG* from = (TG*)u.grad;
    Places places[2];
    float grad[BLOCK], local[BLOCK];
    Walk walk(u, begin);
    walk.look_ahead<TW, TG>(least(BLOCK, end - begin), &places[0]);
    for (int64_t at = begin, turn = 0; at < end; at += BLOCK, turn ^= 1) {
        const int64_t n = least(BLOCK, end - at);
        if (at + BLOCK < end) walk.look_ahead<TW, TG>(least(BLOCK, end - at - BLOCK), &places[turn ^ 1]);
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
        if (s.one_minus_beta1 < 0.5f) // torch.lerp chooses the end that it starts from in the same way
            adamw<false>(s, n, grad, value, u.exp_avg + at, u.exp_avg_sq + at);
        else
            adamw<true>(s, n, grad, value, u.exp_avg + at, u.exp_avg_sq + at);
        for (int64_t i = 0; i < n; ++i) round_to(value[i], weight + here.weight[i]);
    }
}

template <class TW, class TV> void scatter_chunk(const Update& u, const TV* values, int64_t begin, int64_t end) {
    TW* weight = (TW*)u.weight;
    Places places[2];
    Walk walk(u, begin);
    walk.look_ahead<TW, float>(least(BLOCK, end - begin), &places[0]);
    for (int64_t at = begin, turn = 0; at < end; at += BLOCK, turn ^= 1) {
        if (at + BLOCK < end) walk.look_ahead<TW, float>(least(BLOCK, end - at - BLOCK), &places[turn ^ 1]);
        const int64_t n = least(BLOCK, end - at);
        for (int64_t i = 0; i < n; ++i) round_to(to_float(values[at + i]), weight + places[turn].weight[i]);
    }
}

struct Chunk {
    int64_t tensor, begin;
};

} // namespace

int fps::FPS_ISA::scatter_values(const Update& u, const void* values, int64_t values_dtype, int threads) {
    const int64_t chunks = ceil_div(u.nnz, CHUNK);
    return with_dtype(u.weight_dtype, [&](auto weight) {
        return with_dtype(values_dtype, [&](auto value) {
            typedef decltype(value) TV;
#pragma omp parallel for schedule(dynamic) if (threads > 1 && chunks > 2)
            for (int64_t c = 0; c < chunks; ++c)
                scatter_chunk<decltype(weight)>(u, (const TV*)values, c * CHUNK, least((c + 1) * CHUNK, u.nnz));
            return (int)OK;
        });
    });
}

int fps::FPS_ISA::masked_adamw(const Update* updates, int64_t n, const AdamW& how, int threads) {
    const bool skipped = how.found_inf && *how.found_inf != 0;
    if (skipped && !how.zero_grads) return OK;
    int64_t n_chunks = 0;
    for (int64_t t = 0; t < n; ++t) n_chunks += ceil_div(updates[t].nnz, CHUNK);
    Scratch<Scalars> scalars(n);
    Scratch<Chunk> chunks(n_chunks);
    if (!scalars || !chunks) return OUT_OF_MEMORY;
    Chunk* to = chunks.data;
    for (int64_t t = 0; t < n; ++t) {
        if (!skipped) *updates[t].step += 1;
        scalars.data[t] = scalars_of(how, t, *updates[t].step);
        for (int64_t begin = 0; begin < updates[t].nnz; begin += CHUNK) *to++ = {t, begin};
    }
#pragma omp parallel for schedule(dynamic) if (threads > 1 && n_chunks > 2)
    for (int64_t c = 0; c < n_chunks; ++c) {
        const Update& u = updates[chunks.data[c].tensor];
        const Scalars& s = scalars.data[chunks.data[c].tensor];
        const int64_t begin = chunks.data[c].begin, end = least(begin + CHUNK, u.nnz);
        with_dtype(u.weight_dtype, [&](auto weight) {
            return with_dtype(u.grad_dtype, [&](auto grad) {
                if (skipped)
                    zero_chunk<decltype(grad)>(u, begin, end);
                else
                    update_chunk<decltype(weight), decltype(grad)>(u, s, begin, end);
                return (int)OK;
            });
        });
    }
    return OK;
}
