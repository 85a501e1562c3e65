"""Storage: the only package that opens files."""
