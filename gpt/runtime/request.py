"""What a decoding loop is asked for: prompts, and how they are continued.  Without torch, for the command lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpt.comm import Communicator
from gpt.config import BuildConfig, ModelConfig
from gpt.errors import ConfigError
from gpt.runtime.limits import check_prompts
from gpt.runtime.sampling_config import GREEDY, SamplingConfig
from gpt.runtime.stopping import Stops
from gpt.runtime.virtual_tokens import VirtualTokens, check_virtual_tokens


@dataclass(frozen=True)
class Request:
    """Each prompt is continued until `end_id`, a stop word or `max_new_tokens`; a row is a prompt and what follows it.

    prompts: token ids.  end_id: None where no token ends a row.
    virtual: the embeddings behind token ids V and above, with a task per prompt, for engines built for prompt tuning.
    sampling: how tokens are chosen.
    keys: (index of the prompt,) or (index of the prompt, number of the sample) of each row, which together with the
    seed decide what is drawn; by default the rows themselves.  Neighbouring rows may be samples of one prompt, which is
    then computed once.
    stops: what ends a row besides `end_id`.  num_top_logprobs: asks for the tokens' log-probabilities, with those of so
    many of the likeliest tokens.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    end_id: int | None = None
    virtual: VirtualTokens | None = None
    sampling: SamplingConfig = GREEDY
    keys: Sequence[tuple[int, ...]] = ()
    stops: Stops | None = None
    num_top_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.keys:
            object.__setattr__(self, "keys", [(row,) for row in range(len(self.prompts))])

    @property
    def longest(self) -> int:
        """Tokens that the longest row may come to."""
        return max(map(len, self.prompts)) + self.max_new_tokens

    def check(self, model: ModelConfig, build: BuildConfig) -> None:
        """Raises ConfigError for what the engine cannot take."""
        if self.max_new_tokens < 1:
            raise ConfigError("nothing to generate", found=f"{self.max_new_tokens} new tokens", allowed="at least 1")
        num_virtual = 0
        if self.virtual is not None:
            check_virtual_tokens(model, build, self.virtual, len(self.prompts))
            num_virtual = self.virtual.num_tokens
        check_prompts(model, build, self.prompts, self.max_new_tokens, num_virtual=num_virtual)

    def of_rows(self, rows: Sequence[int]) -> Request:
        """The same for some of the rows; one may be there several times."""
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            keys=[self.keys[row] for row in rows],
            virtual=None if self.virtual is None else self.virtual.of_prompts(rows),
        )

    def with_samples(self, count: int) -> Request:
        """`count` rows of each, one behind the other, with a seed where it lacks one."""
        samples = self.of_rows([row for row in range(len(self.prompts)) for _ in range(count)])
        keys = [(*key, sample) for key in self.keys for sample in range(count)]
        return replace(samples, keys=keys, sampling=self.sampling.with_seed())

    def of_first_rank(self, comm: Communicator) -> tuple[Request, bool]:
        """What rank 0 asks for, with a seed, and whether it has stop words.  Those stay on the rank that has them."""
        told = replace(self, sampling=self.sampling.with_seed(), stops=None)
        told, has_stops = comm.broadcast_object((told, self.stops is not None))
        return replace(told, stops=self.stops), has_stops
