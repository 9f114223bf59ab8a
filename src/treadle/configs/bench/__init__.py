"""The TOML files in `benchmarks/`: one a benchmark, settings that were written down before it ran."""
