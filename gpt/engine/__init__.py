"""Stage 3: something that runs."""
