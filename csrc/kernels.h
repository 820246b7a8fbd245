// What the instruction-set variants of the kernels have in common: argument types and one function table per variant.
//
// Plain data only: this header is included by code compiled for different instruction sets, so that an inline function
// with external linkage here could be merged by the linker into the wrong one. No kernel file may use templates or
// inline functions of the standard library for the same reason.
#pragma once

#include <stdint.h>

namespace fps {

enum Status : int { OK = 0, OUT_OF_MEMORY = 1, WRONG_COUNT = 2, WRONG_DTYPE = 3 };
enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Order : int64_t { ORD_1 = 1, ORD_2 = 2, ORD_INF = 3 };

// Every field of the structures below is 8 bytes wide: Python fills them as rows of an int64 table.

struct Matrix { // [rows, cols]; strides count elements and may be anything, 0 included
    const void* data;
    int64_t rows, cols, row_stride, col_stride;
    int64_t dtype;
    const float* factors; // [groups, cols] contiguous, one row of it per rows / groups rows of the matrix
    int64_t groups;
};

struct Images { // [batch, channels, height, width]
    const void* data;
    int64_t batch, channels, height, width;
    int64_t batch_stride, channel_stride, row_stride, col_stride;
    int64_t dtype;
};

struct Convolution { // index 0 is vertical, 1 horizontal
    int64_t kernel[2], stride[2], dilation[2];
    int64_t top, left;  // rows and columns of zeros before the image
    int64_t outputs[2]; // output positions
    int64_t groups;
};

enum Operation : int64_t { ITSELF = 0, GELU = 1, GELU_TANH = 2, LAYER_NORM = 3 };

struct Recomputed { // how the input of a linear map is made of the numbers that are given in its place
    int64_t operation;
    const float *mean, *scale; // [rows], of a LAYER_NORM
    const float *gamma, *beta; // [inputs], or null
};

struct LinearGradients { // of y = x W^T + b: of the chosen entries of W and, where it is asked for, of b
    const void* gy;      // [rows, outputs]
    int64_t gy_row_stride, gy_col_stride, gy_dtype;
    const void* x; // [rows, inputs]
    int64_t x_row_stride, x_col_stride, x_dtype;
    int64_t rows, outputs, inputs;
    const int32_t* row_offsets; // [outputs + 1]
    const int32_t* columns;     // [nnz]
    float* grad;                // [nnz]
    float* bias;                // [outputs], or null
    Recomputed recomputed;
};

struct Entries { // the selected ones of a weight [rows, cols]
    void* weight;
    int64_t row_stride, col_stride, dtype;
    const int32_t* row_offsets; // [rows + 1]
    const int32_t* columns;     // [nnz]
    int64_t rows, nnz;
};

struct SparseDelta {            // [outputs, inputs], zero but for its entries
    const int32_t* row_offsets; // [outputs + 1]
    const int32_t* columns;     // [nnz]
    const float* values;        // [nnz]
    const int32_t* order;       // [nnz]: where the value of an entry is, or null
};

struct Update { // one tensor of masked_adamw
    Entries entries;
    void* grad; // [rows, cols] with these strides, or [nnz] contiguous where `grad_compact` is set
    int64_t grad_row_stride, grad_col_stride, grad_dtype, grad_compact;
    float* master; // [nnz], or null where the weight itself holds the value
    float* exp_avg;
    float* exp_avg_sq;
    float* step;
    float* agreed; // [nnz] as for agree_values, which is done before, and `master` noted here; or null
};

struct Agreement { // one tensor of agree_values
    Entries entries;
    float* values; // [nnz]
    float* agreed; // [nnz]
};

struct Numbers { // in the order of memory: the first dimension has the longest steps; dimensions of one number come first
    const void* data;
    int64_t sizes[4], strides[4];
    int64_t dtype;
};

struct AdamW { // of all tensors of masked_adamw
    const double* lrs;
    const double* weight_decays;
    double beta1, beta2, eps;
    int64_t maximize;
    const float* grad_scale; // or null
    const float* found_inf;  // or null
    int64_t zero_grads;      // of the entries that are selected, once they are read
};

// `threads` is torch's number of threads: it only decides whether to open a parallel region at all.
typedef int ColumnNorm(const Matrix& x, double* acc, int64_t order, int threads);
typedef int ColumnNormConv2d(const Images& x, const Convolution& conv, double* acc, int64_t order, int threads);
typedef int ScoreTopk(const Matrix& w, int64_t k, int32_t* columns, int threads);
typedef int ScoreKth(const Matrix* w, int64_t n, int64_t k, float* threshold, int64_t* greater, int64_t* equal, int threads);
typedef int ScoreCounts(const Matrix* w, int64_t n, const float* thresholds, int64_t* greater, int64_t* equal, int threads);
typedef int ScoreSelect(const Matrix& w, float threshold, int64_t nnz, int32_t* row_offsets, int32_t* columns, int threads);
typedef int SampledGrad(const Images& gy, const Images& x, const Convolution& conv, const int32_t* row_offsets,
                        const int32_t* columns, float* grad, int threads);
typedef int SparseDeltaMatmul(const Matrix& y, const Matrix& x, const SparseDelta& delta, int threads);
typedef int LinearGradientsOf(const LinearGradients& of, int threads);
typedef int ScatterValues(const Entries& entries, const void* values, int64_t values_dtype, int threads);
typedef int MaskedAdamW(const Update* updates, int64_t n, const AdamW& how, int threads);
typedef int AgreeValues(const Agreement* agreements, int64_t n, int threads);

// `key`: of stochastic rounding, below 2^32, or -1 to round to nearest.
typedef int PackGroups(const Numbers& x, int64_t bits, int64_t key, uint8_t* codes, uint16_t* scales, int threads);
typedef int UnpackGroups(const uint8_t* codes, const uint16_t* scales, int64_t bits, void* out, int64_t n, int64_t dtype,
                         int threads);

struct Kernels {
    ColumnNorm* column_norm;
    ColumnNormConv2d* column_norm_conv2d;
    ScoreTopk* score_topk;
    ScoreKth* score_kth;
    ScoreCounts* score_counts;
    ScoreSelect* score_select;
    SampledGrad* sampled_grad;
    LinearGradientsOf* linear_gradients;
    SparseDeltaMatmul* sparse_delta_matmul;
    ScatterValues* scatter_values;
    MaskedAdamW* masked_adamw;
    AgreeValues* agree_values;
    PackGroups* pack_groups;
    UnpackGroups* unpack_groups;
};

#define FPS_DECLARE_KERNELS(isa)                                                                                            \
    namespace isa {                                                                                                         \
    ColumnNorm column_norm;                                                                                                 \
    ColumnNormConv2d column_norm_conv2d;                                                                                    \
    ScoreTopk score_topk;                                                                                                   \
    ScoreKth score_kth;                                                                                                     \
    ScoreCounts score_counts;                                                                                               \
    ScoreSelect score_select;                                                                                               \
    SampledGrad sampled_grad;                                                                                               \
    LinearGradientsOf linear_gradients;                                                                                     \
    SparseDeltaMatmul sparse_delta_matmul;                                                                                  \
    ScatterValues scatter_values;                                                                                           \
    MaskedAdamW masked_adamw;                                                                                               \
    AgreeValues agree_values;                                                                                               \
    PackGroups pack_groups;                                                                                                 \
    UnpackGroups unpack_groups;                                                                                             \
    }

FPS_DECLARE_KERNELS(base)
FPS_DECLARE_KERNELS(avx2)
FPS_DECLARE_KERNELS(avx512)

} // namespace fps
