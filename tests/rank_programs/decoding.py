"""Beams, samples, stop words and scores of an engine, written by rank 0:  decoding.py OUT.json ENGINE_DIR

Stop words and seeds are given to the first rank alone: the others must follow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from engines import random_prompts

from gpt.comm import active
from gpt.engine.folder import open_engine
from gpt.runtime.beam_config import BeamConfig
from gpt.runtime.beams import generate_beams
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session
from gpt.runtime.request import Request
from gpt.runtime.sampling_config import SamplingConfig
from gpt.runtime.scoring import score
from gpt.text.stop_words import StopWords

NEW = 12


def main() -> None:
    out, folder = sys.argv[1:]
    session = load_session(open_engine(Path(folder)), "cpu")
    first = active().rank == 0
    prompts = random_prompts((5, 3), session.model.vocab_size)
    limits: dict[str, Any] = {"max_new_tokens": NEW, "end_id": None}
    beams = BeamConfig(4, num_groups=2, diversity_penalty=0.5)
    free = generate_beams(session, Request(prompts, **limits), beams)
    stops = StopWords(ids=[tuple(free.tokens[0][4:6]), (free.tokens[4][2],)]) if first else None
    penalties = SamplingConfig(repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words=((3,), (4, 5)))
    stopped = generate_beams(session, Request(prompts, stops=stops, sampling=penalties, **limits), BeamConfig(3))
    # Each rank has another seed, and none but the first a stop word.
    sampling = SamplingConfig(top_k=0, seed=7 + active().rank)
    rows, keys = [prompts[0], prompts[0], prompts[1]], [(0, 0), (0, 1), (1, 0)]
    samples = generate(session, Request(rows, keys=keys, sampling=sampling, stops=stops, num_top_logprobs=1, **limits))
    results = {
        "free": free.tokens,
        "scores": free.scores,
        "stopped": stopped.tokens,
        "samples": samples.tokens,
        "logprobs": [[one.logprob for one in row] for row in samples.logprobs],
        "perplexity": [one.perplexity for one in score(session, prompts if first else [])],
    }
    told = [json.dumps(results[name]) for name in ("free", "stopped", "samples", "perplexity")]
    if len(set(session.comm.gather_objects(json.dumps(told)))) > 1:
        raise SystemExit("the ranks have different results")
    if first:
        Path(out).write_text(json.dumps(results))
    active().barrier()


main()
