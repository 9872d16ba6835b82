"""Decode steps of the kernels in Triton's interpreter, their sums in mapped files, beside one rank's:  FOLDER"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from engines import random_prompts, relative_error
from mapped_buffers import mapped_buffers
from test_runtime_cuda_session import BATCHES, BOUNDS, MODELS, begin, make_build

from gpt.checkpoint.random_weights import RandomWeights
from gpt.comm import Communicator, NullCommunicator, start
from gpt.config import ModelConfig
from gpt.engine.weights import engine_tensors
from gpt.kernels.peer_all_reduce import MAX_BYTES
from gpt.mapping import Mapping
from gpt.runtime.cuda_session import CudaSession
from gpt.runtime.peer_memory import PeerSum
from gpt.runtime.torch_session import TorchSession

comm = start()


class CountedSum(PeerSum):
    num_added = 0

    def __call__(
        self, tensor: torch.Tensor, stream: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> bool:
        done = super().__call__(tensor, stream, bias)
        self.num_added += done and stream is not None
        return done


def open_session(kind: type[TorchSession], model: ModelConfig, mapping: Mapping, comm: Communicator) -> TorchSession:
    source = RandomWeights(model, 1, torch.device("cpu"))
    build = replace(make_build("float32"), world_size=mapping.world_size)
    weights = dict(engine_tensors(model, build, mapping, source))
    return kind(model, build, mapping, weights, "cpu", comm)


peers = mapped_buffers(comm, Path(sys.argv[1]))
for name in ("learned", "rope gated"):
    for lengths in BATCHES.values():
        model = MODELS[name]
        small_sum = CountedSum(peers, MAX_BYTES)
        comm.small_sum = small_sum
        session = open_session(CudaSession, model, Mapping(comm.size, comm.rank), comm)
        oracle = open_session(TorchSession, model, Mapping(), NullCommunicator())
        prompts = random_prompts(lengths, model.vocab_size)
        ids = begin(oracle, prompts).argmax(-1)
        begin(session, prompts)
        for step in range(2):
            expected, logits = oracle.generation(ids), session.generation(ids)
            if not relative_error(logits, expected) < BOUNDS["float32"]:
                raise SystemExit(f"rank {comm.rank}: {name} {lengths}, step {step}: {logits} is not {expected}")
            ids = expected.argmax(-1)
        if small_sum.num_added != 2 * 2 * model.n_layer:
            raise SystemExit(f"{small_sum.num_added} sums went to the stream")
sys.stdout.write(f"rank {comm.rank} of {comm.size}: good\n")
sys.stdout.flush()
comm.barrier()
