"""What a machine that can execute TensorRT engines has to show, written so that it also runs over the stand-in.

Each check compares with the torch executor on the CPU and leaves a row in a report, a JSON file to be sent back:
`facts` about machine and libraries, and `rows` of one check each, with its error, its bound and whether it passed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engines import random_prompts
from trt_models import LENGTHS, MODELS, RANK, build_config, logit_errors, random_weights

from gpt.config import BuildConfig, ModelConfig
from gpt.errors import EngineError
from gpt.files import write_text
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.runtime.session import Session
from gpt.runtime.torch_session import TorchSession

# Of the logits, relative L2, against the torch executor in the same type on a CPU.  float32 is far below what products
# rounded to TF32, which engines are built without, would give: 2^-11 per number.
BOUNDS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
Weights = Dict[str, torch.Tensor]
Open = Callable[[ModelConfig, BuildConfig, Weights], Session]
PLUGINS = "plugins packed"  # of a library that has them
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain padded": {},
    "fused padded": {"fused": True},
    "fused packed": {"fused": True, "packed": True},
    PLUGINS: {"packed": True, "plugins": ("attention", "layernorm", "lookup")},
}


@dataclass
class Report:
    path: Path
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, check: str, case: str, *, passed: bool, **values: object) -> None:
        """Written at once: what a crash of the library leaves is a report of everything before it."""
        self.rows.append({"check": check, "case": case, "passed": passed, **values})
        content = {"facts": self.facts, "passed": all(row["passed"] for row in self.rows), "rows": self.rows}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def cases() -> Iterator[tuple[str, str, str]]:
    """Every model, layout and dtype."""
    for name in MODELS:
        for layout in LAYOUTS:
            for dtype in BOUNDS:
                yield name, layout, dtype


def check_logits(report: Report, open_session: Open, name: str, layout: str, dtype: str) -> None:
    """Prompts of four lengths and eight generation steps."""
    model, build = MODELS[name], build_config(dtype, **LAYOUTS[layout])
    weights = random_weights(model, dtype)
    begin = time.perf_counter()
    session = open_session(model, build, weights)
    seconds = time.perf_counter() - begin
    reference = TorchSession(model, build, RANK, weights)
    prompts = random_prompts(LENGTHS, model.vocab_size)
    errors = logit_errors(session, reference, prompts, 8)
    passed = all(error < BOUNDS[dtype] for error in errors)
    report.add(
        "logits", f"{name}, {layout}, {dtype}", passed=passed, errors=errors, bound=BOUNDS[dtype], build_s=seconds
    )
    assert passed, errors


def check_buckets(report: Report, open_session: Open) -> None:
    """Batches of all sizes through buckets and, where steps are captured, their graphs: the same as without."""
    model = MODELS["rotary_swiglu_grouped"]
    weights = random_weights(model)
    bucketed, plain = (
        open_session(model, build_config(fused=True, batch_buckets=buckets), weights) for buckets in ((1, 2), ())
    )
    wrong = []
    for seed, lengths in enumerate([(3,), (7, 2), (1, 5, 2), (2, 2, 9, 4), (6, 3), (12,)]):
        prompts = random_prompts(lengths, model.vocab_size, seed)
        both = [generate(each, Request(prompts, max_new_tokens=8)).tokens for each in (bucketed, plain)]
        if both[0] != both[1]:
            wrong.append(lengths)
    report.add("buckets", "greedy tokens of batches 1 to 4", passed=not wrong, different=wrong)
    assert not wrong


def check_limits(report: Report, open_session: Open) -> None:
    """A request outside the engine's profile is refused by us, with both shapes; the session works afterwards."""
    model, build = MODELS["gpt2"], build_config("float16", fused=True)
    session = open_session(model, build, random_weights(model, "float16"))
    session.start(1, 4)
    message = ""
    try:
        session.context([[1] * (build.max_input_len + 1)])
    except EngineError as error:
        message = str(error)
    passed = (
        f"(1, {build.max_input_len + 1})" in message and f"({build.max_batch_size}, {build.max_input_len})" in message
    )
    tokens = generate(session, Request([[1, 2, 3]], max_new_tokens=4)).tokens
    reference = TorchSession(model, build, RANK, random_weights(model, "float16"))
    passed = passed and tokens == generate(reference, Request([[1, 2, 3]], max_new_tokens=4)).tokens
    report.add("limits", "a prompt that is too long", passed=passed, message=message)
    assert passed, message


def check_speed(report: Report, open_session: Open, model: ModelConfig, dtype: str, num_tokens: int) -> None:
    """Milliseconds per generated token, after one warm-up, for a batch that fills a bucket and one that does not.

    Passes when it runs: the numbers are for whoever reads the report.
    """
    limits = {"max_batch_size": 8, "max_input_len": 128, "max_output_len": num_tokens}
    build = build_config(dtype, fused=True, packed=True, batch_buckets=(1,), **limits)
    session = open_session(model, build, random_weights(model, dtype))
    for batch in (1, 3, 8):
        prompts = random_prompts((128,) * batch, model.vocab_size)
        times = []
        for _ in range(3):
            session.start(batch, 128 + num_tokens)
            chosen = session.context(prompts).argmax(-1)
            begin = time.perf_counter()
            for _ in range(num_tokens - 1):
                chosen = session.generation(chosen).argmax(-1)
            chosen.tolist()  # waits
            times.append((time.perf_counter() - begin) * 1e3 / (num_tokens - 1))
        report.add("speed", f"batch {batch}, 128 + {num_tokens} tokens, {dtype}", passed=True, ms_per_token=times)
