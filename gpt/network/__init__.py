"""Stage 2: the model, written once."""
