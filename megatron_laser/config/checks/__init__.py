"""Cross-field checks: combinations of settings that cannot run or would not mean what they say. No files are read."""
