"""Measured latency and memory, and the table that prices kept channels by them."""
