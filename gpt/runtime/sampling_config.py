"""How the next token is chosen: the settings, checked all at once.  Without torch, for the command lines."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, fields, replace

from gpt.errors import ConfigError, Problems

# Outside of these, float32 logits overflow or nothing of the model's distribution is left.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (1e-3, 1e3),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingConfig:
    """The default, `top_k` 1, is greedy: the likeliest token after penalties and blocks.

    temperature: logits are divided by it.  top_k: that many tokens stay, 0 all.  top_p: the fewest tokens that hold
    this probability mass stay; 1 and, as in the original's settings, 0 mean all.  min_p: tokens stay that have at least
    this part of the likeliest one's probability.
    repetition_penalty: divides positive and multiplies negative logits of all tokens of prompt and output.
    presence_penalty, frequency_penalty: subtracted once, and once per occurrence, from the logits of generated tokens.
    min_length: the end token cannot come before that many new tokens.  no_repeat_ngram_size: no n-gram of prompt and
    output comes twice; 0 is off.  seed: of the random streams, None for another one each time.  bad_words: token
    sequences that must not come, also where they begin in the prompt.
    Raises ConfigError listing all values out of range and all settings that contradict each other.
    """

    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        problems = Problems()
        outside = [name for name, (low, high) in _RANGES.items() if not low <= getattr(self, name) <= high]
        for name in outside:
            value, (low, high) = getattr(self, name), _RANGES[name]
            advice = "; greedy decoding is --top_k 1" if name == "temperature" and value == 0 else ""
            problems.add(f"--{name} {value:g}: allowed are {low:g} to {high:g}{advice}")
        for name in ("top_k", "min_length", "no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                problems.add(f"--{name} {getattr(self, name)}: allowed are 0 (off) and above")
        if self.seed is not None and not 0 <= self.seed <= _MAX_SEED:
            problems.add(f"--seed {self.seed}: allowed are 0 to {_MAX_SEED}")
        if any(not word for word in self.bad_words):
            problems.add("bad_words: one of them has no tokens, so that it would forbid everything")
        if self.top_k == 0 and self.top_p == 0:
            problems.add("--top_k 0 with --top_p 0: --top_k 1 is greedy, --top_p 1 draws from the whole vocabulary")
        if self.is_greedy:
            idle = {"temperature": (1.0,), "top_p": (0.0, 1.0), "min_p": (0.0,)}
            for name in [name for name in idle if name not in outside and getattr(self, name) not in idle[name]]:
                problems.add(
                    f"--{name} {getattr(self, name):g} with --top_k 1: greedy decoding draws nothing, so that it would "
                    "have no effect; --top_k 0 draws from all tokens, --top_k N from the N likeliest"
                )
        problems.raise_if_any(ConfigError, "these sampling settings cannot be used")

    @property
    def is_greedy(self) -> bool:
        return self.top_k == 1

    @property
    def is_argmax(self) -> bool:
        """Whether the model's likeliest token is the result whatever came before."""
        return self.is_greedy and self == SamplingConfig(top_p=self.top_p, seed=self.seed)

    @property
    def is_memoryless(self) -> bool:
        """Whether what came before changes nothing in the choice of a token."""
        settings = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_length", "no_repeat_ngram_size")
        return not self.bad_words and all(getattr(self, name) == getattr(SamplingConfig, name) for name in settings)

    @property
    def num_candidates(self) -> int | None:
        """How many of the likeliest tokens can be chosen, None where what came before may change their order or none is
        excluded."""
        return self.top_k if self.top_k > 0 and self.is_memoryless else None

    @property
    def nucleus(self) -> float:
        """`top_p` with its second spelling of "all" resolved."""
        return self.top_p or 1.0

    def check_fits(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError listing the settings that the model or the length of the output makes impossible."""
        problems = Problems()
        if self.top_k > vocab_size:
            problems.add(f"--top_k {self.top_k}: the vocabulary has {vocab_size} tokens, and 0 takes them all")
        if self.min_length > max_new_tokens:
            problems.add(f"--min_length {self.min_length}: at most {max_new_tokens} new tokens are asked for")
        unknown = sorted({token for word in self.bad_words for token in word if not 0 <= token < vocab_size})
        if unknown:
            shown = ", ".join(map(str, unknown[:5]))
            problems.add(f"--bad_words: token ids {shown}, the model has 0 to {vocab_size - 1}")
        problems.raise_if_any(ConfigError, "these sampling settings do not fit")

    def with_seed(self) -> SamplingConfig:
        """The same with a seed, made up where there is none; greedy decoding needs none."""
        return self if self.is_greedy or self.seed is not None else replace(self, seed=secrets.randbelow(2**32))

    def describe(self) -> str:
        """What differs from greedy decoding, in the words of the flags."""
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if self.is_greedy:
            changed = [name for name in changed if name != "seed"]
        numbers = [f"{name} {getattr(self, name):g}" for name in changed if name not in ("seed", "bad_words")]
        if self.bad_words:
            numbers.append(f"{len(self.bad_words)} bad words")
        settings = ", ".join(numbers)
        kind = "greedy" if self.is_greedy else "sampled"
        seed = f", seed {self.seed}" if "seed" in changed else ""
        return (f"{kind}: {settings}" if settings else kind) + seed


GREEDY = SamplingConfig()
