"""Stage 1: files in the FT layout."""
