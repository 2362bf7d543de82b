"""The hot paths of the networks, one operator a file: reference, torch form, ONNX body."""
