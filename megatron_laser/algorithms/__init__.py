"""What LaSeR computes: torch and numpy only, no process groups, no model."""
