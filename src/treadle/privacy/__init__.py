"""Differential privacy of one row: a plan binds clipping, sampling, noise and accounting, and nothing else joins them."""
