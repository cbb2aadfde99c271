#include "kernels.cuh"

template relay::cuda::Kernels relay::cuda::find_kernels<32>(DataType, int, int);
