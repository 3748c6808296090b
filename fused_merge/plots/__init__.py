"""Pictures of what was measured, and their style; matplotlib comes with the extra `plots`."""
