// The C ABI of the library, and the choice of the instruction set behind it.
//
// Compiled for the base instruction set only. Arguments arrive validated (fps_kernels/ops/_checks.py); what can still go
// wrong comes back as a `Status`.
#include "kernels.h"

#ifdef FPS_X86
#include <cpuid.h>
#endif

#define FPS_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace fps;

constexpr int ABI = 8; // native.py refuses a library left over from another version

#define FPS_TABLE(isa)                                                                                                      \
    {isa::column_norm,  isa::column_norm_conv2d, isa::score_topk,       isa::score_kth,           isa::score_counts,        \
     isa::score_select, isa::sampled_grad,       isa::linear_gradients, isa::sparse_delta_matmul, isa::scatter_values,      \
     isa::masked_adamw, isa::agree_values,       isa::pack_groups,      isa::unpack_groups}

#ifdef FPS_X86
const Kernels TABLES[] = {FPS_TABLE(base), FPS_TABLE(avx2), FPS_TABLE(avx512)};
#else
const Kernels TABLES[] = {FPS_TABLE(base)};
#endif

#ifdef FPS_X86
// F16C and LZCNT, which not every compiler knows by name in __builtin_cpu_supports. Virtual machines may hide them.
bool has_f16c_and_lzcnt() {
    unsigned a, b, c, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    return f16c && __get_cpuid(0x80000001, &a, &b, &c, &d) && (c >> 5 & 1);
}
#endif

int best_isa() {
#ifdef FPS_X86
    __builtin_cpu_init(); // also asks, through xgetbv, whether the operating system saves the wide registers
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && has_f16c_and_lzcnt();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? (avx512 ? 2 : 1) : 0;
#else
    return 0;
#endif
}

int isa_limit = best_isa();
int isa_now = isa_limit;

const Kernels& kernels() { return TABLES[__atomic_load_n(&isa_now, __ATOMIC_RELAXED)]; }

} // namespace

FPS_API int fps_abi() { return ABI; }

// 0 base, 1 avx2, 2 avx512.
FPS_API int fps_best_isa() { return isa_limit; }
FPS_API int fps_isa() { return __atomic_load_n(&isa_now, __ATOMIC_RELAXED); }
FPS_API int fps_set_isa(int isa) {
    if (isa < 0 || isa > isa_limit) return -1;
    return __atomic_exchange_n(&isa_now, isa, __ATOMIC_RELAXED);
}

FPS_API int fps_column_norm(const Matrix* x, double* acc, int64_t order, int threads) {
    return kernels().column_norm(*x, acc, order, threads);
}

FPS_API int fps_column_norm_conv2d(const Images* x, const Convolution* conv, double* acc, int64_t order, int threads) {
    return kernels().column_norm_conv2d(*x, *conv, acc, order, threads);
}

FPS_API int fps_score_topk(const Matrix* w, int64_t k, int32_t* columns, int threads) {
    return kernels().score_topk(*w, k, columns, threads);
}

FPS_API int fps_score_kth(const Matrix* w, int64_t n, int64_t k, float* threshold, int64_t* greater, int64_t* equal,
                          int threads) {
    return kernels().score_kth(w, n, k, threshold, greater, equal, threads);
}

FPS_API int fps_score_counts(const Matrix* w, int64_t n, const float* thresholds, int64_t* greater, int64_t* equal,
                             int threads) {
    return kernels().score_counts(w, n, thresholds, greater, equal, threads);
}

FPS_API int fps_score_select(const Matrix* w, const float* threshold, int64_t nnz, int32_t* row_offsets, int32_t* columns,
                             int threads) {
    return kernels().score_select(*w, *threshold, nnz, row_offsets, columns, threads);
}

FPS_API int fps_sampled_grad(const Images* gy, const Images* x, const Convolution* conv, const int32_t* row_offsets,
                             const int32_t* columns, float* grad, int threads) {
    return kernels().sampled_grad(*gy, *x, *conv, row_offsets, columns, grad, threads);
}

// One pointer to everything: the call costs less than a list of arguments.
FPS_API int fps_linear_gradients(const LinearGradients* of, int threads) { return kernels().linear_gradients(*of, threads); }

FPS_API int fps_sparse_delta_matmul(const Matrix* y, const Matrix* x, const SparseDelta* delta, int threads) {
    return kernels().sparse_delta_matmul(*y, *x, *delta, threads);
}

FPS_API int fps_scatter_values(const Entries* entries, const void* values, int64_t values_dtype, int threads) {
    return kernels().scatter_values(*entries, values, values_dtype, threads);
}

FPS_API int fps_masked_adamw(const Update* updates, int64_t n, const AdamW* how, int threads) {
    return kernels().masked_adamw(updates, n, *how, threads);
}

FPS_API int fps_agree_values(const Agreement* agreements, int64_t n, int threads) {
    return kernels().agree_values(agreements, n, threads);
}

FPS_API int fps_pack_groups(const Numbers* x, int64_t bits, int64_t key, uint8_t* codes, uint16_t* scales, int threads) {
    return kernels().pack_groups(*x, bits, key, codes, scales, threads);
}

FPS_API int fps_unpack_groups(const uint8_t* codes, const uint16_t* scales, int64_t bits, void* out, int64_t n,
                              int64_t dtype, int threads) {
    return kernels().unpack_groups(codes, scales, bits, out, n, dtype, threads);
}
