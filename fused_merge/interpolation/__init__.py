"""The path between two models: tensors, state dicts, a model moved along it, and ratios by part."""
