"""What the decoding loop needs from an engine, whichever library executes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from gpt.comm import Communicator
from gpt.config import BuildConfig, ModelConfig

if TYPE_CHECKING:
    import torch

    from gpt.runtime.virtual_tokens import VirtualTokens


class Session(Protocol):
    """One rank of an engine with the cache of the batch it works on.

    Use: `start`, then `context` once, then `generation` per token.  Logits are [B, V] float32 on `device`, valid until
    the next step; the padding of the vocabulary is already cut off.  Among several ranks, all make the same calls and
    get the same logits.
    """

    model: ModelConfig
    build: BuildConfig
    device: torch.device
    comm: Communicator

    def start(self, batch_size: int, max_seq_len: int) -> None:
        """Makes room for `batch_size` sequences of at most `max_seq_len` tokens, prompt and new ones together; what an
        earlier batch left is forgotten.  Raises ConfigError above the engine's limits."""
        ...

    def limit_logits(self, num_best: int | None) -> None:
        """Until the next `start`, only the `num_best` largest logits of a row (and all that equal the last of them)
        matter: a session may give -inf for the others, which saves several ranks an exchange.  None: all matter."""
        ...

    def context(self, prompts: Sequence[Sequence[int]], virtual: VirtualTokens | None = None) -> torch.Tensor:
        """Runs the prompts (token ids, one sequence each, none empty): logits after the last token of each.
        `virtual` gives the ids behind the vocabulary their embeddings."""
        ...

    def generation(self, ids: torch.Tensor) -> torch.Tensor:
        """Appends one token to each sequence (ids [B], any integer dtype, on `device`): the logits that follow."""
        ...
