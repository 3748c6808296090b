"""A model scored at many ratios, and what the scores say."""
