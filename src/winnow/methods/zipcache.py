"""ZipCache."""

from __future__ import annotations

from winnow.compression.actions.grade import Grade
from winnow.compression.budgets.everything import Everything
from winnow.compression.protocol import Compress
from winnow.compression.scorers.probe_attention import ProbeAttention
from winnow.recipe import Recipe

__all__ = ["zipcache"]


def zipcache(
    *,
    percent: int = 40,
    high: int = 4,
    low: int = 2,
    every: int = 128,
    recent: int = 128,
    random: int = 128,
) -> Recipe:
    """ZipCache: what a few probe queries attend to gets four bits, the rest two.

    Paper: ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification
    (arXiv 2405.14256).
    Code: ThisisBillhe/ZipCache, ``zipcache/models/modeling_llama.py`` and
    ``zipcache/models/CompressUtils/compress_function.py``.

    Acts at the end of every turn's prefill and every ``every`` decode tokens. Keys are rounded per
    channel over all entries of a grade, values per token after their channels were brought to like size.

    Parameters
    ----------
    percent : int
        Entries of every KV head that get the fewer bits, of a hundred (``k_unimportant_ratio``).
    high : {16, 8, 4, 2}
        Bits of the important entries; 16 leaves them as computed.
    low : {16, 8, 4, 2}
        Bits of the others.
    every : int
        Decode tokens between two gradings (``streaming_gap``, 100 in the code); until then new
        entries stay as computed.
    recent : int
        Probes at the end of the prompt (5 % of it in the code).
    random : int
        Probes elsewhere in it (5 %).

    Notes
    -----
    Deviations from the official code:

    - The saliency of an entry is divided by the probes that see it, as in the paper. The code divides by
      the number of all later tokens, which favours recent entries about tenfold.
    - A grading encodes only what came since the last one. The code decodes and encodes the whole cache
      every ``streaming_gap`` tokens, and each round adds its error.
    - While decoding, the latest ``recent`` queries rank the new entries, with the divisor; the code takes
      the current query's row alone, without it.
    - Grades fill pages of 64 entries: the newest up to 63 entries wait, and the share of the lower grade is
      met to half a page, over all gradings together.
    - Each KV head of a grade has its own scales (the code: all heads of a token share theirs, of heads
      that were repeated to all query heads), and each grade its own channel sizes.

    Figures. Embedded model, 4096 tokens, six questions on each of six documents of ``winnow demo``:
    full attention 36 of 36 right, 25.4 MB stored, 25.3 MB read per step; ZipCache 34 of 36, 7.4 MB (with
    what waits for its grade) and 5.7 MB. Shape of Llama 3.2 1B, 8192 entries: 268 MB stored becomes
    69 MB. Decode attention reads the codes as they lie: on two cores 0.96 times full attention's time over
    8192 entries, 0.68 over 32768 (``winnow bench attached``).
    """
    return Recipe(
        name="zipcache",
        compression=Compress(
            score=ProbeAttention(recent=recent, random=random),
            budget=Everything(),
            act=Grade(high=_codec(high), low=_codec(low), percent=percent),
            turns="every",
            every=every,
        ),
    )


def _codec(bits: int) -> str:
    return "raw" if bits == 16 else f"separable:{bits}"
