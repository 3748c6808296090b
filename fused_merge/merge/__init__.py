"""Several finished models merged into one, streamed from disk to disk."""
