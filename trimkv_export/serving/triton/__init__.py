"""Triton Inference Server: a model repository, and the model in it."""
