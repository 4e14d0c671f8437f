"""Models: the Hugging Face adapter, the fused fast path and the embedded model.

`transformers` is imported in this folder only. The engine sees none of it, only
:class:`winnow.types.LanguageModel`.
"""
