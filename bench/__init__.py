"""Benchmarks: what the store and the clustering save and cost. Not installed."""
