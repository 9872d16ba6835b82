"""GPT-family models from a shell: checkpoint to engine to text.  See docs/reading-order.md."""

__version__ = "0.1.0"
