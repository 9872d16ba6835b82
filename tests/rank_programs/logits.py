"""Context, generation steps and greedy tokens of engines, written by rank 0:  logits.py DEVICE OUT.pt ENGINE_DIR...

DEVICE may be "tensorrt padded plain" or "tensorrt packed fused": the TensorRT networks of these engines, evaluated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from engines import random_prompts

from gpt.comm import active
from gpt.config import BuildConfig, ModelConfig
from gpt.engine.folder import open_engine
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session
from gpt.runtime.request import Request
from gpt.runtime.session import Session
from gpt.runtime.virtual_tokens import VirtualTokens

LENGTHS, NEW = (5, 17, 1, 9), 12


def open_session(folder: Path, device: str) -> Session:
    if not device.startswith("tensorrt"):
        return load_session(open_engine(folder), device)
    from trt_ranks import stand_in_session

    return stand_in_session(open_engine(folder), device)


def virtual_tokens(model: ModelConfig, build: BuildConfig) -> VirtualTokens | None:
    if build.max_prompt_embedding_table_size == 0:
        return None
    table = torch.randn(2, 3, model.n_embd, generator=torch.Generator().manual_seed(1))
    return VirtualTokens(table, (0, 1, 1, 0))


def main() -> None:
    results = []
    device, out, *folders = sys.argv[1:]
    for folder in folders:
        session = open_session(Path(folder), device)
        model = session.model
        virtual = virtual_tokens(model, session.build)
        prompts = random_prompts(LENGTHS, model.vocab_size)
        if virtual is not None:
            prompts = [[*range(model.vocab_size, model.vocab_size + 3), *prompt] for prompt in prompts]
        session.start(len(prompts), 3 + max(LENGTHS) + NEW)
        steps = [session.context(prompts, virtual).cpu().clone()]
        for step in range(3):
            new = torch.tensor([(11 * step + 3 * row) % model.vocab_size for row in range(len(prompts))])
            steps.append(session.generation(new.to(session.device)).cpu().clone())
        logits = torch.cat(steps)
        if len(set(session.comm.gather_objects(logits.numpy().tobytes()))) > 1:
            raise SystemExit(f"{folder}: the ranks have different logits")
        tokens = generate(session, Request(prompts, max_new_tokens=NEW, virtual=virtual)).tokens
        results.append({"logits": logits, "tokens": tokens})
    if active().rank == 0:
        torch.save(results, out)
    active().barrier()


main()
