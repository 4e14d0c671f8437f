"""An OpenAI-compatible server that runs a recipe and never recomputes what it has."""
