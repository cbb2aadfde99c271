#include "kernels.cuh"

template relay::cuda::Kernels relay::cuda::find_kernels<128>(DataType, int, int);
