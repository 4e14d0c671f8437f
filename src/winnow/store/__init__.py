"""The single owner of entries, lengths and positions, and the files they are saved in."""

from winnow.store.codecs import EncodedSegment
from winnow.store.files import StoreFileError
from winnow.store.sequence import SequenceStore

__all__ = ["EncodedSegment", "SequenceStore", "StoreFileError"]
