"""Whether two mathematical answers are the same: reading, spelling, and one three-valued relation."""
