r"""Whether two mathematical answers are the same, True, False or None where it is undecided; in the order of reading:

1. `grading`: a response against a reference; the fast paths, and the way through everything below.
2. Text: `boxed` finds the last \boxed{...}; `normalization` brings LaTeX and Unicode to one spelling, over
   `latex_tokens`, which cuts outside brackets; `units` takes off what stands beside a number.
3. Parsing: `answer_parser` makes one of the `answer_types` of that text; `expression_parser` (SymPy) takes single
   expressions, `equations` what has a relation in it, `intervals` sets of reals.
4. Comparing: `answer_equality` compares parsed answers by their kind, `expression_equality` the expressions in them.
"""
