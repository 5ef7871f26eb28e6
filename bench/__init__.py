"""Benchmarks, each a program; bench/report.py is what they share and bench/all.py runs them all."""
