"""The tests as files: what pytest needs of their names."""

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_two_test_files_have_one_name():
    """pytest imports them as modules of that name, without their folders, and refuses the second."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert len(names) > 200 and [name for name, count in names.items() if count > 1] == []
