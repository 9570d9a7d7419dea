r"""A reference answer as a model would write it: other LaTeX for the same thing, and a sentence around the box.

What applies to a reference depends on its form; every reference has at least one respelling that is not its own text.
"""

from __future__ import annotations

import re

_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"-?\d*\.\d+")
_SIMPLE_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_LIST = re.compile(r"(-?\d+), ?(?!\d{3}$)(-?\d+)")  # 58,500 is a number
_PLACED = {"\\pi": "π", "\\infty": "∞", "\\cup": "∪", "\\pm": "±"}

# how a response ends; the box is what counts
ENDINGS = (
    "Adding both parts gives the result. The final answer is $\\boxed{%s}$.",
    "We tried \\boxed{0}, which fails. Therefore\n\\[\n\\boxed{%s}\n\\]\n",
    "**Answer:** \\(\\boxed{ %s }\\). I hope it is correct.",
)


def respellings(gold: str) -> dict[str, str]:
    r"""Other spellings of a reference by name; for example `\frac{1}{2}` as `1/2` and `\dfrac{1}{2}`."""
    gold = gold.strip().removeprefix("$").removesuffix("$").strip()
    found = {
        "thin spaces around it": f"\\,{gold}\\;",
        "displaystyle": f"\\displaystyle {gold}",
        "a full stop in the box": f"{gold}.",
        "sized brackets": re.sub(
            r"(?<!\\left)(?<!\\right)(\\[{}]|[()\[\]])",
            lambda match: ("\\left" if match[1][-1] in "([{" else "\\right") + match[1],
            gold,
        )
        if "\\left" not in gold and "\\text" not in gold and gold.count("(") == gold.count(")")
        else gold,
        "display fractions": re.sub(r"\\frac(?![a-z])", r"\\dfrac", gold),
        "Unicode symbols": _symbols(gold),
        "a Unicode minus": gold.replace("-", "−") if "\\text" not in gold else gold,
        "other matrix brackets": gold.replace("pmatrix", "bmatrix"),
    }
    if _INTEGER.fullmatch(gold):
        found["a name in front"] = f"N = {gold}"
        found["a decimal"] = f"{gold}.0"
        found["a unit"] = f"{gold}~\\mathrm{{cm}}"
        if len(gold.lstrip("-")) > 3:
            found["thin spaces between digits"] = f"{int(gold):,}".replace(",", "\\,")
            found["commas between digits"] = f"{int(gold):,}"
    if _DECIMAL.fullmatch(gold):
        found["a zero more"] = f"{gold}0"
    if simple := _SIMPLE_FRACTION.fullmatch(gold):
        found["a slash"] = f"{simple[1]}{simple[2]}/{simple[3]}"
        found["not reduced"] = f"{simple[1]}\\frac{{{2 * int(simple[2])}}}{{{2 * int(simple[3])}}}"
    if word := _TEXT.fullmatch(gold):
        found["bold"] = f"\\textbf{{{word[1]}}}"
        found["upright"] = f"\\mathrm{{{word[1]}}}"
        found["without a command"] = word[1]
    if both := _LIST.fullmatch(gold):
        found["the other order"] = f"{both[2]}, {both[1]}"
    return {name: text for name, text in found.items() if text != gold}


def _symbols(gold: str) -> str:
    for command, symbol in _PLACED.items():
        gold = re.sub(re.escape(command) + r"(?![a-zA-Z])", symbol, gold)
    return gold.replace("^\\circ", "°")


def as_a_model(text: str, number: int) -> str:
    """A response that ends with `text` in a box; `number` picks the ending."""
    return ENDINGS[number % len(ENDINGS)].replace("%s", text)
