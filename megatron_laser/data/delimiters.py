"""Where a text such as a blank line is complete in a list of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


class Delimiter:
    """Finds the tokens with which an occurrence of `text` ends, whichever tokens it is cut into."""

    def __init__(self, text: str, decode: Callable[[int], str], vocab_size: int) -> None:
        """
        Args:
            text: not empty.
            decode: a token id to its text. Called once for each id of the vocabulary, so that batches are searched as
                arrays.
        """
        self._text = text
        self._pieces = [decode(token) for token in range(vocab_size)]
        # A token can end an occurrence if it holds one, or begins with the end of one.
        self._may_end = np.array([self._could_end(piece) for piece in self._pieces], dtype=np.bool_)

    @classmethod
    def of_tokenizer(cls, text: str, tokenizer: Any, vocab_size: int) -> Delimiter:
        """In a tokenizer's tokens, special ones with their text; ids of the model that it does not know have none."""
        known = len(tokenizer)

        def decode(token: int) -> str:
            if token >= known:
                return ""
            return str(
                tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )

        return cls(text, decode, vocab_size)

    @property
    def last_tokens(self) -> list[int]:
        """The ids with which an occurrence may be complete, increasing."""
        found: list[int] = np.flatnonzero(self._may_end).tolist()
        return found

    def completes(self, token_ids: npt.NDArray[np.integer]) -> bool:
        """Whether an occurrence is complete with the last of the tokens."""
        return bool(len(token_ids)) and bool(
            self._may_end[int(token_ids[-1])] and self._is_end(token_ids, len(token_ids) - 1)
        )

    def ends(self, token_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """How many tokens lie before each place behind which an occurrence is complete, increasing."""
        candidates = np.flatnonzero(self._may_end[token_ids])
        return np.array(
            [index + 1 for index in candidates.tolist() if self._is_end(token_ids, index)], np.int64
        )

    def _could_end(self, piece: str) -> bool:
        text = self._text
        return text in piece or any(piece.startswith(text[cut:]) for cut in range(1, len(text)))

    def _is_end(self, token_ids: npt.NDArray[np.integer], index: int) -> bool:
        piece = self._pieces[int(token_ids[index])]
        before, place = "", index
        while place > 0 and len(before) < len(self._text) - 1:
            place -= 1
            before = self._pieces[int(token_ids[place])] + before
        before = before[len(before) - min(len(before), len(self._text) - 1) :]
        found = (before + piece).rfind(self._text)
        return found >= 0 and found + len(self._text) > len(before)
