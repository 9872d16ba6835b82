"""Stage 4: steps, cache and the decoding loop."""
