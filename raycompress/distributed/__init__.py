"""Ray: replicas that host the model, a pool that dispatches units to them, Tune that runs trials.

The only part of raycompress that imports Ray; importing this package alone doesn't, yet.
"""
