"""What codecs share whose codes a decode step reads as they lie."""

from __future__ import annotations

import abc

from torch import Tensor

from winnow.kernels.backend import Backend
from winnow.kernels.coded_decode import Coded, coded_decode, is_fast
from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.protocol import Decoded
from winnow.types import AttentionSpec, Partial, Selection

__all__ = ["ReadAsCodes"]


class ReadAsCodes(Decoded, abc.ABC):
    """A codec whose planes are those of :class:`winnow.kernels.coded_decode.Coded`."""

    @abc.abstractmethod
    def coded(self, segment: EncodedSegment) -> Coded:
        """The planes of a segment under the names that the kernel gives them; views."""

    def attend(
        self,
        q_HD: Tensor,
        segment: EncodedSegment,
        *,
        spec: AttentionSpec,
        position: int,
        selection: Selection | None,
        want_logits: bool,
        backend: Backend,
    ) -> Partial | None:
        """Attention over the codes; None for lists, logits and biases, which decode what they read."""
        if selection is not None or want_logits or segment.bias is not None:
            return None
        coded = segment.derived("coded", self.coded)
        if not is_fast(q_HD, coded, spec, backend):
            return None
        return coded_decode(q_HD, coded, spec=spec, position=position, backend=backend)
