"""Compression actions."""
