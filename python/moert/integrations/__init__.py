"""Bridges to other packages; each is imported only on demand."""
