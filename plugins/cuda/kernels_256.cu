#include "kernels.cuh"

template relay::cuda::Kernels relay::cuda::find_kernels<256>(DataType, int, int);
