"""Foreign libraries, found and wrapped: ONNX Runtime, TensorRT, CUDA, the native kernels, NVML."""
