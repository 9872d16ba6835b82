"""The Hugging Face model that results are compared with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.console import log
from gpt.dtypes import torch_dtype
from gpt.errors import CheckpointError, ConfigError, brief
from gpt.runtime.beam_config import NO_BEAMS, BeamConfig
from gpt.runtime.generate import Generation, joined
from gpt.runtime.sampling_config import SamplingConfig
from gpt.text.hub import use_cache_when_offline
from gpt.text.stop_words import StopWords, StopWordState

if TYPE_CHECKING:
    import torch


class HfBaseline:
    """`transformers`' own causal language model with its own `generate`, on token ids."""

    def __init__(self, location: str, dtype: str, device: torch.device):
        """`location`: a folder or a name on the hub; `dtype`: float32, float16 or bfloat16.

        Raises ConfigError where there is no such model, CheckpointError where it cannot be loaded.
        """
        is_path = Path(location).is_absolute() or location.startswith((".", "~"))
        if is_path and not Path(location).is_dir():
            raise ConfigError("no such model folder", found=location, hint="--hf_model_location")
        if not Path(location).is_dir():
            use_cache_when_offline()
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        begin = time.perf_counter()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                location, dtype=torch_dtype(dtype), trust_remote_code=False
            )
        except Exception as error:  # the library raises many kinds for unusable files
            raise CheckpointError(
                f"the Hugging Face model {location} cannot be loaded",
                found=brief(error),
                hint="--hf_model_location takes a local folder, or a name on the hub where one can be reached",
            ) from error
        # Sampling settings that came with the checkpoint would make the comparison unequal.
        model.generation_config = GenerationConfig()
        self.model = model.eval().to(device)
        self.device = device
        self.vocab_size: int = model.config.vocab_size
        self.n_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        seconds = time.perf_counter() - begin
        log.info("Hugging Face model loaded: %s, %s on %s, %.2f s", location, dtype, device, seconds)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_id: int | None,
        sampling: SamplingConfig | None = None,
        first_row: int = 0,
        beams: BeamConfig = NO_BEAMS,
        stops: StopWords | None = None,
    ) -> Generation:
        """Continues each prompt; prompts of different lengths are padded on the left and masked.  Penalties and blocks
        would take the padding for text: with them, such prompts are run one by one.

        sampling: all of its settings but presence and frequency penalty, which `transformers` does not have; greedily
        for None.  A batch draws from one random stream of torch, made from the seed and `first_row`: the distributions
        are those of our engine, the tokens are not.
        beams: the `beams.num_returned` best hypotheses of each prompt, or as many samples, one after the other.
        stops: what ends a text besides `end_id`.
        """
        import torch
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        if sampling is not None and not sampling.is_memoryless and len(set(map(len, prompts))) > 1:
            return joined(
                [
                    self.generate([prompt], max_new_tokens, end_id, sampling, row, beams, stops)
                    for row, prompt in enumerate(prompts, start=first_row)
                ]
            )
        stamps: list[float] = []
        watch = None if stops is None else _StopWatch(stops)

        class Clock(StoppingCriteria):
            """Called after each token; stops rows whose stop word is complete."""

            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                stamps.append(time.perf_counter())
                stopped = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
                if watch is not None:
                    stopped[:] = torch.tensor(watch.step(input_ids[:, width:].tolist()))
                return stopped

        pad_id = 0 if end_id is None else end_id
        width = max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=beams.num_beams,
            num_return_sequences=beams.num_returned,
            length_penalty=beams.length_penalty,
            early_stopping=beams.early_stopping,
            eos_token_id=end_id,
            pad_token_id=pad_id,
            **_choice(sampling),
        )
        if sampling is not None and sampling.seed is not None:
            torch.manual_seed(sampling.seed + first_row)
        begin = time.perf_counter()
        with torch.inference_mode():
            rows = self.model.generate(
                ids, attention_mask=mask, generation_config=settings, stopping_criteria=StoppingCriteriaList([Clock()])
            )
        new = rows[:, width:].tolist()
        end = time.perf_counter()
        # A step's time runs from stamp to stamp; what follows the last stamp belongs to the last step.
        stamps[-1] = end
        new = [cut_at_end(row, end_id) for row in new]
        return Generation(
            tokens=new if stops is None else [list(stops.ended(row)) for row in new],
            context_ms=(stamps[0] - begin) * 1e3,
            step_ms=[(later - earlier) * 1e3 for earlier, later in itertools.pairwise(stamps)],
        )


class _StopWatch:
    """Which rows have just completed a stop word; in a beam search a row goes on as a copy of any one before."""

    def __init__(self, stops: StopWords):
        self._states: dict[tuple[int, ...], StopWordState] = {(): stops.start()}

    def step(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """rows: all new tokens of each, one more than in the last call."""
        states = {tuple(row): self._states[tuple(row[:-1])].copy() for row in rows}
        stopped = {row: state.add(row[-1]) for row, state in states.items()}
        self._states = states
        return [stopped[tuple(row)] for row in rows]


def _choice(sampling: SamplingConfig | None) -> dict[str, Any]:
    """All of them, since `transformers` has a top-k of 50 by itself."""
    if sampling is None:
        return {"do_sample": False}
    choice: dict[str, Any] = {
        "do_sample": not sampling.is_greedy,
        "repetition_penalty": float(sampling.repetition_penalty),
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size,
        "min_new_tokens": sampling.min_length,
        "bad_words_ids": [list(word) for word in sampling.bad_words] or None,
    }
    if not sampling.is_greedy:
        choice |= {
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k,
            "top_p": float(sampling.nucleus),
            "min_p": float(sampling.min_p) or None,
        }
    return choice


def cut_at_end(row: list[int], end_id: int | None) -> list[int]:
    """The row up to and with its first end token; behind it `generate` pads."""
    return row[: row.index(end_id) + 1] if end_id in row else row
