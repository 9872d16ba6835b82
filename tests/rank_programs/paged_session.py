"""Prompts that join and leave over blocks on several ranks, by kernels in Triton's interpreter, beside one rank's."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"

import torch
from engines import random_prompts
from test_runtime_cuda_session import MODELS, make_build

from gpt.checkpoint.random_weights import RandomWeights
from gpt.comm import Communicator, NullCommunicator, start
from gpt.config import ModelConfig
from gpt.engine.weights import engine_tensors
from gpt.mapping import Mapping
from gpt.runtime.batcher import generate_paged
from gpt.runtime.cuda_session import CudaSession
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession

comm = start()


def open_session(kind: type[TorchSession], model: ModelConfig, mapping: Mapping, comm: Communicator) -> TorchSession:
    build = replace(make_build("float32"), world_size=mapping.world_size, max_batch_size=2, max_num_tokens=8)
    build = replace(build, paged_kv_cache=True, tokens_per_block=4, use_inflight_batching=True)
    weights = dict(engine_tensors(model, build, mapping, RandomWeights(model, 1, torch.device("cpu"))))
    # Small random weights say the same whatever they read.
    weights = {name: tensor * 8 if tensor.dim() == 2 else tensor for name, tensor in weights.items()}
    return kind(model, build, mapping, weights, "cpu", comm)


for name in ("learned", "multi-query"):
    prompts = random_prompts((3, 9, 1), MODELS[name].vocab_size)
    session = open_session(CudaSession, MODELS[name], Mapping(comm.size, comm.rank), comm)
    found = generate_paged(session, Request(prompts, max_new_tokens=4)).tokens
    oracle = open_session(TorchSession, MODELS[name], Mapping(), NullCommunicator())
    expected = [generate(oracle, Request([prompt], max_new_tokens=4)).tokens[0] for prompt in prompts]
    if comm.rank == 0 and found != expected:
        raise SystemExit(f"{name}: {found} is not {expected}")
sys.stdout.write(f"rank {comm.rank} of {comm.size}: good\n")
sys.stdout.flush()
comm.barrier()
