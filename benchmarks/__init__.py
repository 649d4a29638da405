"""Benchmarks of megamoe: bench.py measures, report.py renders, baselines/ holds what it is compared with."""
