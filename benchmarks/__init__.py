"""Measured against peers, in one run: ratios of medians, never absolute times in a test."""
