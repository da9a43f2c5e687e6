"""Quantized models as files, and on runtimes that compute in integers."""
