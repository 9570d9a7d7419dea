"""What is told and drawn from what a run or an evaluation recorded: tables, words, figures."""
