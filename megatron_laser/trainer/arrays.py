"""Named arrays in NumPy's .npz format, the same for every NumPy from 1.26 on, and never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import IO

import numpy as np


def save_arrays(file: str | PathLike[str] | IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays under their names.

    Raises:
        ValueError: one holds Python objects, which only pickle could store.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects, which are not written")
    # No options: before NumPy 2.2 savez has none, and takes each for one more array.
    np.savez(file, **arrays)  # type: ignore[arg-type]
