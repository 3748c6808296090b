"""The reference delta: made, saved, sparsified, inspected."""
