"""From a trained network to an ONNX graph: rewrite, trace, compare."""
