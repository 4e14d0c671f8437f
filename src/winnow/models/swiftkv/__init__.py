"""SwiftKV: a transformed model whose prompt tokens skip the later layers, and its distillation.

``model`` runs it, ``student`` is the same computation for training, ``distill`` trains it:
``python -m winnow.models.swiftkv distill MODEL --layers N --group G --out DIR``.
"""
