"""Code as it exists at those who come to Tidings: only the imports from `tidings` are new."""
