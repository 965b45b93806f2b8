"""Metrics, statistics and run folders."""
