"""The engine: sequences advance in packed steps; recipes say what is computed, kept and read.

Read in this order: ``request`` (what is asked), ``sequence`` (what a running sequence owns),
``attend`` (the one place where the parts meet the model), ``scheduler`` (who advances by how
much), ``engine`` (the loop), ``session`` (a sequence that outlives one request).
"""
