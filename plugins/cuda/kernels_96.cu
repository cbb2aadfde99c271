#include "kernels.cuh"

template relay::cuda::Kernels relay::cuda::find_kernels<96>(DataType, int, int);
