// score_counts (fps_kernels/ops/reference.py): one read of the weights.
#include "parts/score_items.h"

int fps::FPS_ISA::score_counts(const Matrix* w, int64_t n, const float* thresholds, int64_t* greater, int64_t* equal,
                               int threads) {
    int64_t n_items = 0;
    for (int64_t t = 0; t < n; ++t) {
        n_items += count_items(w[t]);
        greater[t] = equal[t] = 0;
    }
    Scratch<Item> items(n_items);
    if (!items) return OUT_OF_MEMORY;
    list_items(w, n, items.data);
    const int64_t tile_elements = largest_tile(w, n);
    int failed = 0;
#pragma omp parallel if (threads > 1 && n_items > 1)
    {
        Scratch<uint32_t> tile(tile_elements);
        if (!tile) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n_items; ++i) {
            if (!tile) continue;
            Item& item = items.data[i];
            const I threshold = broadcast(key(thresholds[item.tensor], 1.0f));
            for_item(w, item, tile.data, [&](I here) {
                item.greater += count(gt(here, threshold));
                item.inside += count(eq(here, threshold));
            });
        }
    }
    for (int64_t i = 0; i < n_items; ++i) {
        greater[items.data[i].tensor] += items.data[i].greater;
        equal[items.data[i].tensor] += items.data[i].inside;
    }
    return failed ? OUT_OF_MEMORY : OK;
}
