"""Compression budgets."""
