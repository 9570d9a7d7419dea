"""The resolved run on a given number of ranks: layout, batch arithmetic, memory. What a dry run shows."""
