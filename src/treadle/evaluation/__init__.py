"""Measuring: likelihoods, generation, generated code, intervals."""
