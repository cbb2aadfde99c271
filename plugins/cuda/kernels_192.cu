#include "kernels.cuh"

template relay::cuda::Kernels relay::cuda::find_kernels<192>(DataType, int, int);
