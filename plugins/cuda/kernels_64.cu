#include "kernels.cuh"

template relay::cuda::Kernels relay::cuda::find_kernels<64>(DataType, int, int);
