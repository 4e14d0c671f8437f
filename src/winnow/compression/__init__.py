"""Compression: what stays of the computed entries, and in which form."""
