"""The kernels as ONNX functions: their nodes and their bodies of standard operators."""
