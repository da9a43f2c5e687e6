"""Quantizers: frozen dataclasses whose fields are their YAML keys."""
