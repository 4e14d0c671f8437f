"""Kernels: one folder per operation, one signature, up to three implementations.

``reference.py`` is plain PyTorch written for reading and is the oracle; ``native.py`` calls the
C++ extension; ``triton.py`` runs on a GPU. Each folder's ``__init__`` is the one entry and
chooses through :func:`winnow.kernels.backend.choose`.
"""
