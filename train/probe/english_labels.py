"""Labels of the characters of English prose: what spelling and lists of words tell.

Parts of speech but for the closed classes, and names of people and places, would need a trained tagger; none is small
and comes without a download.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_WORDS = {
    "article": "a an the",
    "pronoun": "i me my mine you your yours he him his she her hers it its we us our ours they them their theirs who "
    "whom whose this that these those myself himself herself itself ourselves themselves",
    "preposition": "of in to for with on at by from about into over after under between through during before against "
    "without within upon toward towards among across behind beyond",
    "conjunction": "and or but nor so yet because although though while if unless since whereas than",
    "auxiliary verb": "is are was were be been being am has have had do does did will would shall should can could may "
    "might must",
    "negation": "not no never none nothing neither nor cannot",
    "number": "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred "
    "thousand million billion first second third",
}
_SENTENCE = r"(?:\A|[.!?][\"'”’)\]]*\s+|\n\s*\n\s*)[\"'“‘(\[]*"
_PATTERNS = {
    **{label: rf"\b(?:{'|'.join(words.split())})\b" for label, words in _WORDS.items()},
    "number": rf"\b(?:{'|'.join(_WORDS['number'].split())})\b|\b\d[\d,.]*\b",
    "start of a sentence": rf"{_SENTENCE}(\w+)",
    "end of a sentence": r"[.!?](?=[\"'”’)\]]*(?:\s|\Z))",
    "in quotes": r"[\"“][^\"“”\n]{1,500}[\"”]",
    "in brackets": r"\([^()]{1,500}\)",
}
_COMPILED = {label: re.compile(pattern, re.IGNORECASE) for label, pattern in _PATTERNS.items()}
_CAPITALISED = re.compile(r"\b[A-Z][a-z]+")


def english_labels(text: str) -> dict[str, Array]:
    """Return for each label the characters of `text` that have it, as [n] bool."""
    found = {label: np.zeros(len(text), bool) for label in (*_COMPILED, "capitalised inside a sentence")}
    for label, pattern in _COMPILED.items():
        for match in pattern.finditer(text):
            low, high = match.span(
                pattern.groups
            )  # of the word alone, where the pattern also matches what is before it
            found[label][low:high] = True
    for match in _CAPITALISED.finditer(text):
        if not found["start of a sentence"][match.start()]:
            found["capitalised inside a sentence"][match.start() : match.end()] = True
    return found
