"""Settings: one file for a group of sections, all keys known, everything frozen; `root.RunConfig` is the whole."""
