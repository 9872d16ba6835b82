"""What the decoding loop needs from an engine, whichever library executes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gpt.comm import Communicator
from gpt.config import BuildConfig, ModelConfig

if TYPE_CHECKING:
    import torch

    from gpt.engine.step import AheadStep, PagedStep
    from gpt.runtime.sampling import Draws
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

    def reorder(self, sources: Sequence[int]) -> None:
        """Sequence i goes on as sequence sources[i] has come so far.  Their number may change, up to the batch size of
        `start`: after `context` of B prompts, beams or samples of them are B * K sequences."""
        ...

    def prompt_logits(
        self, prompt: Sequence[int], places: Sequence[int], virtual: VirtualTokens | None = None
    ) -> torch.Tensor:
        """Runs one prompt: the logits [K, V] behind its tokens number `places`, counted from 0.  `start` comes before,
        and before anything else.  Raises ConfigError where the engine only tells those of the last token."""
        ...


@runtime_checkable
class RunsAhead(Protocol):
    """A session whose device chooses tokens itself and does not wait for the host to see them."""

    def run_ahead(
        self, first: torch.Tensor, num_steps: int, draws: Draws | None = None
    ) -> Iterator[tuple[list[int], list[float]]]:
        """Appends `first` [B], then each step's choice, the likeliest tokens or what `draws` draws: yields per step the
        tokens and the largest logits.  Closing the iterator ends the batch."""
        ...


@runtime_checkable
class RecordsSteps(Protocol):
    """A session that records steps when they first come, which makes that first time slow."""

    @property
    def recording_seconds(self) -> float:
        """What that has taken so far, compiling of kernels included."""
        ...


class PagedSession(Session, Protocol):
    """A session that has a pool of cache blocks as well: sequences come and go, each step names their blocks.

    Who schedules decides which block belongs to whom (`gpt.runtime.blocks`).  Logits are valid until the next step.
    batch_invariant: see gpt.runtime.execution; a sequence's tokens are then divided into steps as if it were alone.
    """

    batch_invariant: bool

    def start_paged(self, num_blocks: int, tokens_per_block: int) -> None:
        """Makes the pool.  One with as many blocks or more is kept."""
        ...

    @property
    def num_pool_blocks(self) -> int:
        """Of the pool that there is, 0 before the first `start_paged`."""
        ...

    def run_paged(self, step: PagedStep) -> torch.Tensor:
        """Writes the new tokens' K and V to their blocks: the logits [K, V] float32 of the wanted tokens."""
        ...


@runtime_checkable
class PagedRunsAhead(Protocol):
    """A paged session whose device chooses the likeliest tokens itself for several steps."""

    def run_paged_ahead(self, step: AheadStep) -> Iterator[tuple[list[int], list[float]]]:
        """Sets the device to work, and yields per step the chosen tokens and their logits as they come.  Other steps
        may be asked for before these have been read."""
        ...
