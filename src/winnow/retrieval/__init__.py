"""Retrieval: fetching reusable KV from a pool."""
