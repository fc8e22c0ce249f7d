"""Code as it exists at those who come to Tidings: only the imports of the broadcaster and of ProgressTask are ours."""
