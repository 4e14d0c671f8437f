"""Compression scorers."""
