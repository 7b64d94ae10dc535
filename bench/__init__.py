"""Benchmarks of kdflow beside its peers and the hardware's floors: ``python -m bench --help``."""
