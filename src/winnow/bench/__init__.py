"""Measurements, each beside the machine's limit and a fair baseline in the same run."""
