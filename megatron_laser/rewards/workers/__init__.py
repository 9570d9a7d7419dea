"""Grading in processes that may hang, crash or be killed, each answer within its deadline."""
