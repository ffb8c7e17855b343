"""Cleaning steps, each by name. A step takes a text and gives the text that is left of it: none drops the document.

The ``c4`` steps are the rules of C4 (Raffel et al. 2020, section 2.2), without its list of bad words (which is not
ours to ship), its detection of English, and its removal of repeated three-sentence spans, in whose place whole
documents are compared (:mod:`lmx.preparation.duplicates`). They are made for pages of the web: lines are
paragraphs. On text that is wrapped, or that is code, they throw most of it away.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from lmx.errors import ConfigError, nearest

Step = Callable[[str], str]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
_ASCII_CONTROL = bytes([*range(0x09), *range(0x0B, 0x20), 0x7F])  # those of them below 0x80
_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?:\s|$)")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_TERMINAL, _ELLIPSIS = (".", "!", "?", '"', "”"), "..."
C4_LINE_WORDS, C4_SENTENCES = 5, 3


def _unicode(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _control(text: str) -> str:
    if text.isascii() and len(text.encode().translate(None, _ASCII_CONTROL)) == len(text):
        return text  # most texts, and much faster than looking for them with the pattern
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text)


def _citations(text: str) -> str:
    return _CITATION.sub("", text) if "[" in text else text


def _curly(text: str) -> str:
    return "" if "{" in text else text


def _placeholder(text: str) -> str:
    return "" if "lorem ipsum" in text.lower() else text


def _sentences(text: str) -> str:
    return text if len(_SENTENCE_END.findall(text)) >= C4_SENTENCES else ""


def _lines(keep: Callable[[str], bool]) -> Step:
    """The step that keeps some of the lines."""
    return lambda text: "\n".join(filter(keep, text.split("\n")))


def _is_ended(line: str) -> bool:
    line = line.rstrip()
    return line.endswith(_TERMINAL) and not line.endswith(_ELLIPSIS)


def _has_words(line: str) -> bool:
    return len(line.split()) >= C4_LINE_WORDS


def _is_no_policy(line: str) -> bool:
    lowered = line.lower()
    return not any(words in lowered for words in _POLICY)


# In the order in which they are done.
STEPS: dict[str, tuple[Step, str]] = {
    "unicode": (_unicode, "composed characters: Unicode's form NFC (UAX #15)"),
    "control": (_control, "without control characters and byte order marks; line ends are \\n"),
    "citations": (_citations, "C4: Wikipedia's [1], [edit] and [citation needed] removed"),
    "javascript": (_lines(lambda line: "javascript" not in line.lower()), "C4: lines that mention Javascript removed"),
    "policy": (_lines(_is_no_policy), "C4: lines on cookies, privacy and terms of use removed"),
    "punctuation": (_lines(_is_ended), "C4: lines that do not end in . ! ? or a quotation mark removed"),
    "line_words": (_lines(_has_words), f"C4: lines of fewer than {C4_LINE_WORDS} words removed"),
    "placeholder": (_placeholder, "C4: documents with 'lorem ipsum' dropped"),
    "curly": (_curly, "C4: documents with a { dropped, which are code more often than not"),
    "sentences": (_sentences, f"C4: documents of fewer than {C4_SENTENCES} sentences dropped"),
}  # fmt: skip
C4 = ("citations", "javascript", "policy", "punctuation", "line_words", "placeholder", "curly", "sentences")
GROUPS = {"none": (), "default": ("unicode", "control"), "c4": ("unicode", "control", *C4)}
SHORT = "min_words"  # how documents without enough words are counted
UNREADABLE = "unreadable"  # and records that hold no text, where they are skipped


def chosen_steps(names: str) -> tuple[str, ...]:
    """The steps that ``unicode,control`` or ``default`` names, in the order in which they are done.

    Raises:
      ConfigError: a name is unknown.
    """
    wanted: set[str] = set()
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name not in STEPS and name not in GROUPS:
            raise ConfigError(f"there is no cleaning step {name!r}{nearest(name, [*STEPS, *GROUPS])}")
        wanted.update(GROUPS.get(name, (name,)))
    return tuple(name for name in STEPS if name in wanted)


def describe_steps() -> str:
    """A line for each step, for ``--help``."""
    groups = [f"  {name:<12} {', '.join(steps) or 'no step at all'}" for name, steps in GROUPS.items()]
    return "\n".join([*(f"  {name:<12} {meaning}" for name, (_, meaning) in STEPS.items()), *groups])


class Cleaner:
    """Applies steps, and counts what each took away.

    Attributes:
      dropped: documents that a step left nothing of, by its name; ``min_words`` are the too short ones.
      removed: characters that a step removed, those of dropped documents with them.
    """

    def __init__(self, steps: Sequence[str], min_words: int):
        self._steps, self._min_words = [(name, STEPS[name][0]) for name in steps], min_words
        self.dropped = dict.fromkeys([*steps, SHORT], 0)
        self.removed = dict.fromkeys([*steps, SHORT], 0)

    def __call__(self, text: str) -> str:
        """The cleaned text; empty where the document is dropped."""
        for name, step in [*self._steps, (SHORT, self._long_enough)]:
            cleaned = step(text)
            self.removed[name] += len(text) - len(cleaned)
            if not cleaned or cleaned.isspace():
                self.dropped[name] += 1
                self.removed[name] += len(cleaned)
                return ""
            text = cleaned
        return text

    def _long_enough(self, text: str) -> str:
        return text if len(text.split(None, self._min_words)) >= self._min_words else ""
