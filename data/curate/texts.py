"""Which texts are refused: by length, letters, words that are not wanted, and repetition. What language they are in is not asked.

Words are what lies between white space, so that rules in words say little of a language that writes without.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

# Rae et al. 2021, arXiv:2112.11446, table A1: the largest shares of a document's lines or characters
LINES, LINE_CHARS, PARAGRAPHS, PARAGRAPH_CHARS = 0.30, 0.20, 0.30, 0.20
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
REPETITION_WORDS = 50
"""Below these many words (the same paper's least document) a phrase said twice is already a large share."""


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """Texts that are refused. Rules of form hold for text parts and captions, `banned` for conversations, questions and answers too."""

    min_chars: int = 0
    """Characters, white space at the ends not counted."""
    max_chars: int | None = None
    """None: any number."""
    min_words: int = 0
    """Words, as white space parts them."""
    max_words: int | None = None
    """None: any number."""
    min_letters: float = 0.0
    """Least share of letters among characters that are not white space; letters of any script."""
    min_wordlike: float = 0.0
    """Least share of words that hold a letter; 0.8 in Gopher's rules (Rae et al. 2021, section A.1.1)."""
    repetition: bool = False
    """Refuse texts of 50 words and more that repeat lines, paragraphs or phrases more than Gopher's table A1 allows."""
    banned: Path | None = None
    """A file of words and phrases that no text may hold, one a line, as C4's rule (Raffel et al. 2020, section 2.2). Case is ignored,
    words are matched whole."""


def check_form(text: str, rules: TextRules) -> None:
    """Errors: ValueError "cause: …"."""
    text = text.strip()
    words = text.split()
    for count, low, high, unit in ((len(text), rules.min_chars, rules.max_chars, "chars"),
                                   (len(words), rules.min_words, rules.max_words, "words")):
        if count < low:
            raise ValueError(f"short text: {count:,} {unit}, under min_{unit} = {low:,}")
        if high is not None and count > high:
            raise ValueError(f"long text: {count:,} {unit}, over max_{unit} = {high:,}")
    if rules.min_letters:
        letters, whole = sum(map(str.isalpha, text)), sum(map(len, words))
        if letters < rules.min_letters * whole or not whole:
            raise ValueError(f"few letters: {letters} of {whole} characters, under min_letters = {rules.min_letters:g}")
    if rules.min_wordlike:
        wordlike = sum(any(map(str.isalpha, word)) for word in words)
        if wordlike < rules.min_wordlike * len(words) or not words:
            raise ValueError(f"few words: {wordlike} of {len(words)} hold a letter, under min_wordlike = {rules.min_wordlike:g}")
    if rules.repetition and len(words) >= REPETITION_WORDS:
        _check_repetition(text, words)


def check_words(text: str, rules: TextRules) -> None:
    """Errors: ValueError "banned words: …"."""
    if rules.banned is None:
        return
    words = _plain(text)
    for length, banned in banned_words(rules.banned).items():
        if hit := next((gram for gram in _ngrams(words, length) if gram in banned), None):
            raise ValueError(f"banned words: it says {' '.join(hit)!r}, which {rules.banned.name} lists")


@lru_cache(4)
def banned_words(path: Path) -> dict[int, set[tuple[str, ...]]]:
    """{words of them: phrases} of a file, the short ones first. Errors: FileNotFoundError, ValueError for an empty one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: `banned` is a file of words, one a line")
    phrases = sorted((tuple(_plain(line)) for line in path.read_text(encoding="utf-8").splitlines()), key=len)
    found = {length: set(several) for length, several in groupby(phrases, len) if length}
    if not found:
        raise ValueError(f"{path} lists no words: write one a line, or leave `banned` away")
    return found


def _plain(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _ngrams(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _check_repetition(text: str, words: Sequence[str]) -> None:
    for name, pieces, share, char_share in (("lines", text.splitlines(), LINES, LINE_CHARS),
                                            ("paragraphs", re.split(r"\n\s*\n", text), PARAGRAPHS, PARAGRAPH_CHARS)):
        repeated, chars, count = repeated_pieces([piece.strip() for piece in pieces if piece.strip()])
        if repeated > share * count or chars > char_share * len(text):
            raise ValueError(f"repetition: {repeated} of {count} {name} ({chars:,} of {len(text):,} characters) were said before")
    total = sum(map(len, words))
    for n, share in TOP_NGRAM.items():
        if (chars := top_ngram_chars(words, n)) > share * total:
            raise ValueError(f"repetition: one phrase of {n} words is {chars:,} of {total:,} characters, over {share:.0%}")
    for n, share in REPEATED_NGRAMS.items():
        if (chars := repeated_ngram_chars(words, n)) > share * total:
            raise ValueError(f"repetition: phrases of {n} words said before are {chars:,} of {total:,} characters, over {share:.0%}")


def repeated_pieces(pieces: Sequence[str]) -> tuple[int, int, int]:
    """→ how many are like one before, their characters, how many there are"""
    counts = Counter(pieces)
    return len(pieces) - len(counts), sum((count - 1) * len(piece) for piece, count in counts.items()), len(pieces)


def top_ngram_chars(words: Sequence[str], n: int) -> int:
    """Characters of all places of the phrase of n words that is said most, of those the longest; 0 where none is said twice."""
    counts = Counter(_ngrams(words, n))
    most = max(counts.values(), default=1)
    return 0 if most == 1 else most * max(sum(map(len, gram)) for gram, count in counts.items() if count == most)


def repeated_ngram_chars(words: Sequence[str], n: int) -> int:
    """Characters of words that lie in a phrase of n words which was said before; each word counts once."""
    seen, repeated = set[tuple[str, ...]](), set[int]()
    for i, gram in enumerate(_ngrams(words, n)):
        if gram in seen:
            repeated.update(range(i, i + n))
        seen.add(gram)
    return sum(len(words[i]) for i in repeated)
