"""Our kernels inside TensorRT engines, as quickly deployable plugins compiled ahead of time.

`programs` says what is launched, `ptx` compiles it, `registration` hands both to TensorRT, `graph` prepares
the ONNX file. The code travels inside the engine: what runs it needs neither Python nor a plugin library.
"""
