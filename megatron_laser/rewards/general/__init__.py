"""Answers that are no mathematics: letters of multiple-choice questions, and short texts. Strings only."""
