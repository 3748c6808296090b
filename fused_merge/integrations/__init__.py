"""Training frameworks: one small file for each, which imports it and is imported only when it is used."""
