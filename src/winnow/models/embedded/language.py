"""The language of the embedded model: its words, its pieces and its tokenizer.

A piece is what one token stands for, with its leading space if it has one, so that the
pieces of a text, joined, are the text.  The generator of `documents` writes pieces; the
tokenizer finds the same pieces again in the joined text (a test holds them together).
Everything that is no word of this language is spelt in characters, and what is no
character of it in UTF-8 bytes, so every text survives encoding and decoding.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _spaced(words: str) -> tuple[str, ...]:
    """Pieces of the words of a list, each with its leading space."""
    return tuple(f" {word}" for word in words.split())


BOS, EOS, UNKNOWN, PAD = "<s>", "</s>", "<unk>", "<pad>"
SPECIAL = (UNKNOWN, BOS, EOS, PAD)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
NEWLINE = "\n"

ARROW, IS, EQUALS, COLON, ANSWER = " ->", " is", " =", " :", " A:"
#: what stands before a value; the model may treat them alike
SEPARATORS = (ARROW, IS, EQUALS, COLON, ANSWER)
QUESTION, KEY, SET, LABEL, THE, CODE, OF, STOP = "Q:", "key", "set", "label", "The", " code", " of", "."
#: the same openings with a space before them, as they stand inside a question
SPACED = (" key", " set", " label", " the")

SYLLABLES = tuple(c + v for c, v in product("bdfghjklmnprstvz", "aeio"))
#: a name is a first and a second syllable, a value a first and a second number: ``bako``, ``48-21``
FIRST_SYLLABLES = tuple(f" {s}" for s in SYLLABLES)
SECOND_SYLLABLES = SYLLABLES
FIRST_NUMBERS = tuple(f" {n}" for n in range(10, 100))
SECOND_NUMBERS = tuple(f"-{n}" for n in range(10, 100))

#: eight categories of twelve nouns; a document gives each category a label of its own
CATEGORIES: tuple[tuple[str, ...], ...] = tuple(
    _spaced(line)
    for line in (
        "apple pear plum cherry peach mango lemon orange grape melon banana apricot",
        "dog cat horse cow pig goat sheep rabbit fox wolf bear deer",
        "red blue green yellow purple pink brown grey white black violet crimson",
        "hammer saw drill wrench chisel pliers axe shovel rake file clamp spade",
        "piano violin flute drum trumpet guitar harp cello oboe organ banjo lute",
        "shirt coat hat scarf glove sock shoe boot dress skirt belt jacket",
        "oak pine birch maple willow cedar elm ash beech spruce poplar larch",
        "eagle robin crow owl hawk sparrow swan duck goose heron finch raven",
    )
)
LABELS = _spaced(
    "dax wug blick fep toma gorp zav mib tulver kiv snerg plim vash crolt quib drux "
    "frob glorp hask jeb klum lorn mungo nolt orvo prenk rulf skiv thorp unta vex wim "
    "yorp zint brale chup dwim elto flim gant hobb ickle jask krell lumph morb nixa pog"
)

#: lists of whole numbers, of which the largest and the smallest are asked for
SERIES = ("level", "depth", "speed", "width")
LARGEST, SMALLEST = " largest", " smallest"
STRING, SPACED_STRING, DOTS = "string", " string", "..."
CONTEXT, SPACED_CONTEXT = "context", " context"
#: what a heading calls the lines under it
CONTEXTS = _spaced(
    "attic cellar pantry study parlour nursery gallery chapel stable barn mill forge tavern bakery "
    "dairy brewery armoury vault lobby porch balcony terrace loft den"
)

#: these came after the others and have the last token ids
LATER = (
    *(*SERIES, *_spaced(" ".join(SERIES)), LARGEST, SMALLEST, STRING, SPACED_STRING, DOTS),
    *(CONTEXT, SPACED_CONTEXT, *CONTEXTS),
)

# Filler: sentences of the form subject, verb, object, place, time.
SUBJECTS = _spaced(
    "farmer doctor teacher baker sailor painter writer driver child neighbour lawyer clerk "
    "student gardener miller soldier singer tailor hunter guard merchant pilot cook nurse judge"
)
OPENERS = ("The", "A", "One", "This", "That", "Another", "Every", "My", "Our", "Their")
ADJECTIVES = _spaced(
    "old young tired happy quiet clever strange famous careful honest gentle proud lonely brave "
    "small large heavy bright empty broken simple wooden golden narrow"
)
VERBS = _spaced(
    "found carried painted repaired bought sold watched followed forgot opened closed cleaned lost "
    "noticed borrowed counted measured described hid moved visited remembered drew studied returned"
)
OBJECTS = _spaced(
    "letter basket window table bridge lamp mirror garden wagon clock ladder bottle map coin rope "
    "kettle blanket chair box book bell candle picture door wheel bucket"
)
PLACES = _spaced(
    "river market station harbour church forest mountain village kitchen library castle valley "
    "school theatre museum field square tower road island"
)
LINKS = _spaced("near behind beside above below inside outside beyond")
TIMES = _spaced("yesterday today again early late twice often alone quickly slowly")
GLUE = _spaced(
    "the a an and or but of in on at to from with for by was were are be been it he she they we you "
    "not no so as if when then there here who what which where how has had have do did will would "
    "can could all some many few one two three four five six code value"
)
FILLER = tuple(dict.fromkeys(SUBJECTS + ADJECTIVES + VERBS + OBJECTS + PLACES + LINKS + TIMES + GLUE))
CHARACTERS = (*(chr(c) for c in range(0x20, 0x7F)), "\t")


def vocabulary() -> tuple[str, ...]:
    """All pieces in the order of their token ids; special tokens and bytes first."""
    words = (
        *(NEWLINE, *SEPARATORS, QUESTION, KEY, SET, LABEL, CODE, OF, STOP, *SPACED, *OPENERS),
        *(*FIRST_SYLLABLES, *SECOND_SYLLABLES, *FIRST_NUMBERS, *SECOND_NUMBERS),
        *(*(noun for nouns in CATEGORIES for noun in nouns), *LABELS, *FILLER, *CHARACTERS),
    )
    return tuple(dict.fromkeys((*SPECIAL, *BYTES, *words, *LATER)))


def identifiers() -> dict[str, int]:
    """Token id of every piece."""
    return {piece: token for token, piece in enumerate(vocabulary())}


#: A system message is the document.  The last line of a user message is the question and what
#: stands before it more of the document; an assistant message is an answer.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{- message['content'].rstrip('\\n') + '\\n' -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- set lines = message['content'].rstrip('\\n').rsplit('\\n', 1) -%}"
    "{%- if lines | length == 2 -%}{{- lines[0] + '\\n' -}}{%- endif -%}"
    "{{- 'Q: ' + lines[-1] + ' A:' -}}"
    "{%- else -%}"
    "{{- ' ' + message['content'].strip() + '\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: the fewest pieces that spell a text, words before characters before bytes.

    There is no normaliser and no pre-tokeniser, so nothing of the text is lost.  A document that
    spells a special token (``<s>``) gives that token, as with every tokenizer of this library.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    pieces = vocabulary()

    def score(piece: str) -> float:
        if piece in SPECIAL or piece in BYTES:
            # far below any spelling in characters: the text "<0x41>" must not become the byte 0x41
            return -1000.0
        return -10.0 if len(piece) == 1 else -9.0

    unigram = models.Unigram([(piece, score(piece)) for piece in pieces], 0, byte_fallback=True)
    built = Tokenizer(unigram)
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bos = pieces.index(BOS)
    built.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=16384,
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_tokenizer(directory: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template."""
    tokenizer().save_pretrained(directory)
