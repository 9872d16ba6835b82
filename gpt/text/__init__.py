"""Stage 5: strings in, strings out."""
