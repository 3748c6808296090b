"""Whole checkpoints: model folders of many ratios, streamed from disk to disk."""
