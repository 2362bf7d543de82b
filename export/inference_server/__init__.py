"""A model repository for NVIDIA's Triton Inference Server, and its client."""
