"""Generation: which query-key scores a prefill computes."""
