"""TensorRT engines: options, profiles, the build in a process of its own, the record in the bundle."""
