"""Ratios found by optimization: the search, and the answers that it learns from."""
