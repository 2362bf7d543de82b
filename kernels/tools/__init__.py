"""Developer tools: ahead-of-time compilation of the kernels."""
