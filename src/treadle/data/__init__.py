"""Rows, prompts, tasks and public text: what adapters are trained on, measured on and calibrated with."""
