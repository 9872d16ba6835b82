"""How a beam search is run: the settings, checked all at once.  Without torch, for the command lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpt.config import BuildConfig
from gpt.errors import ConfigError, Problems

EarlyStopping = bool | Literal["never"]

# Scores are divided by length ** length_penalty: beyond this, float32 has no numbers for lengths in the thousands.
_MAX_LENGTH_PENALTY = 10.0
_MAX_DIVERSITY_PENALTY = 100.0


@dataclass(frozen=True)
class BeamConfig:
    """The meanings are those of `transformers`' generate.

    num_beams: hypotheses that are followed at a time.  length_penalty: the score of a hypothesis is the sum of its
    log-probabilities over length ** length_penalty, new tokens alone counted; above 0 favours long ones.
    early_stopping: True ends a prompt once it has `num_beams` hypotheses; False also once no running beam at its
    present length could do better than the worst of them; "never" once none could at any length.
    num_groups, diversity_penalty: the beams fall into groups that choose one after the other, and a token costs
    `diversity_penalty` for each beam of an earlier group that has just taken it (Vijayakumar et al. 2016).
    num_return: hypotheses per prompt, best first; None for all beams, as in the original.
    Raises ConfigError listing all values out of range and all settings that contradict each other.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_groups: int = 1
    diversity_penalty: float = 0.0
    num_return: int | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        if self.num_beams < 1:
            problems.add(f"--num_beams {self.num_beams}: allowed are 1 and above")
        if not -_MAX_LENGTH_PENALTY <= self.length_penalty <= _MAX_LENGTH_PENALTY:
            allowed = f"{-_MAX_LENGTH_PENALTY:g} to {_MAX_LENGTH_PENALTY:g}"
            problems.add(f"--length_penalty {self.length_penalty:g}: allowed are {allowed}")
        if self.early_stopping not in (True, False, "never"):
            problems.add(f"--early_stopping {self.early_stopping!r}: allowed are true, false, never")
        if not 0 <= self.diversity_penalty <= _MAX_DIVERSITY_PENALTY:
            allowed = f"0 to {_MAX_DIVERSITY_PENALTY:g}"
            problems.add(f"--diversity_penalty {self.diversity_penalty:g}: allowed are {allowed}")
        if self.num_groups < 1:
            problems.add(f"--num_beam_groups {self.num_groups}: allowed are 1 and above")
        elif self.num_beams >= 1 and self.num_beams % self.num_groups:
            problems.add(
                f"--num_beam_groups {self.num_groups}: groups are of one size, so it must divide "
                f"--num_beams {self.num_beams}"
            )
        if self.num_groups == 1 and self.diversity_penalty > 0:
            problems.add("--diversity_penalty with one group of beams: it is between groups (--num_beam_groups)")
        if self.num_groups > 1 and self.diversity_penalty == 0:
            problems.add(
                f"--num_beam_groups {self.num_groups} without --diversity_penalty: all groups would find the same"
            )
        if self.num_return is not None and self.num_return < 1:
            problems.add(f"--num_return_sequences {self.num_return}: allowed are 1 and above")
        if self.num_return is not None and 1 < self.num_beams < self.num_return:
            problems.add(
                f"--num_return_sequences {self.num_return}: a search with --num_beams {self.num_beams} has so many"
            )
        if self.num_beams == 1:
            problems.items += self._idle()
        problems.raise_if_any(ConfigError, "these beam settings cannot be used")

    def _idle(self) -> list[str]:
        """Settings that would have no effect without beams."""
        given = []
        if self.length_penalty != 1.0:
            given.append(f"--length_penalty {self.length_penalty:g}")
        if self.early_stopping is not False:
            given.append(f"--early_stopping {self.early_stopping}".lower())
        return [f"{flag} without beams has no effect: --num_beams N" for flag in given]

    @property
    def num_returned(self) -> int:
        """Hypotheses per prompt."""
        return self.num_beams if self.num_return is None else self.num_return

    @property
    def group_size(self) -> int:
        return self.num_beams // self.num_groups

    def check_fits(self, build: BuildConfig, vocab_size: int) -> None:
        """Raises ConfigError where the engine was built for fewer beams, or the vocabulary has too few words."""
        if self.num_beams > build.max_beam_width:
            raise ConfigError(
                "more beams than the engine was built for",
                found=f"--num_beams {self.num_beams}",
                allowed=f"at most {build.max_beam_width}, the engine's --max_beam_width",
                hint=f"build.py ... --max_beam_width {self.num_beams}",
            )
        if 2 * self.group_size > vocab_size:
            raise ConfigError(
                "more beams than words to begin with",
                found=f"{self.group_size} beams in a group",
                allowed=f"at most {vocab_size // 2}, half the vocabulary",
            )

    def describe(self) -> str:
        """What differs from a plain beam search, in the words of the flags."""
        words = [f"{self.num_beams} beams"]
        if self.length_penalty != 1.0:
            words.append(f"length_penalty {self.length_penalty:g}")
        if self.early_stopping is not False:
            words.append(f"early_stopping {self.early_stopping}".lower())
        if self.num_groups > 1:
            words.append(f"{self.num_groups} groups, diversity_penalty {self.diversity_penalty:g}")
        return ", ".join(words)


NO_BEAMS = BeamConfig()
