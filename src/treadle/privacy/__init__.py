"""Differential privacy of one row: plans that bind clipping, sampling, noise and accounting; what data have spent."""
