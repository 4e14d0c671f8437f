"""Loading: which stored entries a decode step reads."""
