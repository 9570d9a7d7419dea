"""Cross-field checks: combinations of settings that cannot run or would not mean what they say. No files are read.

`settings` checks the sections with each other and `rollout` those about servers, `layout` the model and the number of
ranks; each problem is one line with the arithmetic.
"""
