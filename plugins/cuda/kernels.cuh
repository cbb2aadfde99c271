#pragma once

#include "attention.cuh"
#include "kernels.h"
#include "reference.cuh"

namespace relay::cuda {

template <class T, int kHeadDim>
Kernels kernels_of(int prefix_rows, int context_rows) {
  Kernels kernels{attention_kernel<T, kHeadDim, 16, 16>, append_kernel<T>,
                  reference_attention_kernel<T, kHeadDim / 32>};
  if (context_rows == 64)
    kernels.attention = attention_kernel<T, kHeadDim, 64, 64>;
  else if (prefix_rows >= 64)
    kernels.attention = attention_kernel<T, kHeadDim, 64, 16>;
  if constexpr (kHeadDim <= kMaxWideHeadDim) {
    if (prefix_rows == 128 && context_rows == 64) kernels.attention = attention_kernel<T, kHeadDim, 128, 64>;
    if (prefix_rows == 128 && context_rows == 16) kernels.attention = attention_kernel<T, kHeadDim, 128, 16>;
  }
  return kernels;
}

template <int kHeadDim>
Kernels find_kernels(DataType dtype, int prefix_rows, int context_rows) {
  return dtype == DataType::kFloat16 ? kernels_of<Float16, kHeadDim>(prefix_rows, context_rows)
                                     : kernels_of<BFloat16, kHeadDim>(prefix_rows, context_rows);
}

}  // namespace relay::cuda
