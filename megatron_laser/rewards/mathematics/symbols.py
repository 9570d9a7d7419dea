"""Unicode characters of mathematics and their LaTeX."""

from __future__ import annotations

# vulgar fractions: numerator and denominator
FRACTIONS: dict[str, tuple[int, int]] = {
    **{
        "½": (1, 2),
        "⅓": (1, 3),
        "⅔": (2, 3),
        "¼": (1, 4),
        "¾": (3, 4),
        "⅕": (1, 5),
        "⅖": (2, 5),
        "⅗": (3, 5),
    },
    **{
        "⅘": (4, 5),
        "⅙": (1, 6),
        "⅚": (5, 6),
        "⅐": (1, 7),
        "⅛": (1, 8),
        "⅜": (3, 8),
        "⅝": (5, 8),
        "⅞": (7, 8),
    },
    **{"⅑": (1, 9), "⅒": (1, 10)},
}
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ", "0123456789+-nx", strict=True))

_GREEK = {
    **dict(
        zip("αβγδεζηθ", ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"], strict=True)
    ),
    **dict(zip("ικλμνξπρ", ["iota", "kappa", "lambda", "mu", "nu", "xi", "pi", "rho"], strict=True)),
    **dict(zip("στυφχψωϕ", ["sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "phi"], strict=True)),
    **dict(
        zip(
            "ΓΔΘΛΞΠΣΦΨΩ",
            ["Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega"],
            strict=True,
        )
    ),
}
_COMMANDS = {
    "times": "×✕✖",
    "cdot": "·⋅∙",
    "le": "≤⩽≦",
    "ge": "≥⩾≧",
    "ne": "≠",
    "approx": "≈",
    "equiv": "≡",
    "infty": "∞",
    "cup": "∪",
    "cap": "∩",
    "in": "∈",
    "emptyset": "∅",
    "pm": "±",
    "mp": "∓",
    "to": "→",
    "angle": "∠",
    "ldots": "…⋯",
    "setminus": "∖",
    "langle": "⟨〈",
    "rangle": "⟩〉",
    "lfloor": "⌊",
    "rfloor": "⌋",
    "lceil": "⌈",
    "rceil": "⌉",
    "sum": "∑",
    "int": "∫",
    **{name: character for character, name in _GREEK.items()},
    "phi": "φϕ",
}
# for str.translate; a blank ends a command's name
CHARACTERS: dict[int, str] = {
    **{ord(character): f"\\{name} " for name, characters in _COMMANDS.items() for character in characters},
    **{ord(character): "-" for character in "‐‑‒–—―−﹣－➖"},
    **{ord(character): "^\\circ " for character in "°˚º"},
    **{ord(character): "'" for character in "’′‘"},
    **{ord(character): '"' for character in "“”″"},
    **{0xFF10 + digit: str(digit) for digit in range(10)},
    **{
        ord(wide): narrow
        for wide, narrow in zip("（），．＋＝＜＞｛｝［］：；％", "(),.+=<>{}[]:;%", strict=True)
    },
    ord("÷"): "/",
    ord("∕"): "/",
    ord("⁄"): "/",
    ord("ℝ"): "\\mathbb{R}",
    ord("，"): ",",
    ord("、"): ",",
    ord("。"): ".",
    ord("＊"): "*",
    ord("％"): "%",
}
