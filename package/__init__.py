"""RelayAttention (Zhu et al., ACL 2024) for ONNX Runtime and TensorRT."""

__version__ = "0.1.0"
