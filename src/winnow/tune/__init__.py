"""Tune: what is learnt about a model offline, and the search for a recipe under a budget."""
