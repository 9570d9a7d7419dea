r"""The answer that a response ends in: the last \boxed{...}, else the last sentence that says "the answer is"."""

from __future__ import annotations

import re

from megatron_laser.rewards.mathematics.boxed import MAX_ANSWER_CHARS, Box, find_last_box

# "The answer is X", "Final answer: X", "**Answer:** X", "The correct option would be X"; what follows is the answer.
# "this answer is right" and "option C is wrong" say something else: the cue has one of these words in front, or is a
# line's beginning.
_CUE = re.compile(
    r"(?:\b(?:the|my|our|final|correct|right|best|so|thus|hence|therefore)\s+|^[^\S\n]*[#*>_-]*[^\S\n]*)"
    r"(?:(?:final|correct|right|best)\s+)*"
    r"(?P<noun>answer|(?<=correct )(?:option|choice)|(?<=right )(?:option|choice)|(?<=best )(?:option|choice))"
    r"(?:\s+(?:choice|option))?"
    r"(?:\s+(?:to|for)\s+[^.:\n]{0,80}?)?"
    r"(?:[\s*_]*:[\s*_]*|\s*=\s*|[\s*_]*\s(?:is|are|would\s+be|should\s+be|must\s+be|will\s+be)\b[\s*_]*:?[\s*_]*)"
    r"(?:(?:therefore|thus|then|hence|simply|just|clearly|indeed|given\s+by)\b[\s,]*)*",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<![A-Z][a-z])(?<!\b[A-Z])[.!?]\s+(?=[A-Z*(\\$])")
_BLANKS, _LINES = re.compile(r"[^\S\n]+"), re.compile(r" ?\n\s*")
_LOOKED_AT = 20_000  # characters at the end of a response in which the sentence is looked for
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|emph|mbox|boxed)\s*\{([^{}]*)\}"
)
_MARKS = " \t*_`\"'"


def stated_answer(response: str) -> Box:
    r"""Like `find_last_box`, with the sentence for what has no box at all.

    The last of each decides alone. A box comes before any sentence: "the answer is \boxed{C}" has one answer.
    """
    box = find_last_box(response)
    if box.state != "none":
        return box
    text = _LINES.sub(
        "\n", _BLANKS.sub(" ", response[-_LOOKED_AT:])
    )  # no run of blanks to go back and forth in
    cues = list(_CUE.finditer(text))
    if not cues:
        return box
    rest = text[cues[-1].end() :].lstrip(_MARKS + "\n")
    line = rest.partition("\n")[0]
    if end := _SENTENCE_END.search(line):
        line = line[: end.start()]
    line = line.strip(_MARKS).rstrip(".!" + _MARKS)
    return Box("found", line) if line and len(line) <= MAX_ANSWER_CHARS else Box("bad")


def unwrapped(text: str) -> str:
    r"""What stands in `\text{}`, `\mathrm{}` and the like, with a blank on each side, in the place of the command."""
    previous = None
    while previous != text:
        previous, text = text, _WRAPPER.sub(r" \1 ", text)
    return text
