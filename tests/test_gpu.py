"""The PyTorch executor on a CUDA GPU beside the same engine on the CPU.  Run where there is a GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import build_engine, convert, open_session, random_prompts, relative_error

from gpt.engine.folder import EngineInfo
from gpt.mapping import Mapping
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session
from gpt.runtime.request import Request
from gpt.runtime.session import Session
from gpt.runtime.torch_session import TorchSession

pytestmark = pytest.mark.gpu

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "gpt2-tiny"
LENGTHS = (5, 17, 1, 9)
ARCHITECTURES = {
    "learned": [],
    "rope swiglu": ["--rotary_pct", "0.5", "--hidden_act", "swiglu", "--no_bias"],
    "multi-query": ["--multi_query_mode"],
}


def steps(session: Session, prompts: list[list[int]], num_steps: int = 4) -> torch.Tensor:
    """Logits of the context step and of a few generation steps with fixed tokens, on the CPU."""
    session.start(len(prompts), max(LENGTHS) + num_steps)
    logits = [session.context(prompts).cpu()]
    for step in range(num_steps):
        ids = torch.tensor([(7 * step + row) % 50 for row in range(len(prompts))], device=session.device)
        logits.append(session.generation(ids).cpu())
    return torch.cat(logits)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    "layout", [[], ["--use_gpt_attention_plugin", "--remove_input_padding"]], ids=["plain", "fused"]
)
def test_bundled_model(dtype: str, bound: float, layout: list[str], tmp_path: Path) -> None:
    checkpoint = convert(BUNDLED, tmp_path / "ft")
    oracle = open_session(build_engine(checkpoint, tmp_path / "cpu"))
    session = load_session(build_engine(checkpoint, tmp_path / "gpu", "--dtype", dtype, *layout), "cuda")
    prompts = random_prompts(LENGTHS, 4096)
    assert relative_error(steps(session, prompts), steps(oracle, prompts)) < bound
    if dtype == "float32":
        both = [generate(s, Request(prompts, max_new_tokens=100)).tokens for s in (session, oracle)]
        assert both[0] == both[1]


@pytest.mark.parametrize("flags", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_other_architectures(flags: list[str], make_random: Callable[..., EngineInfo]) -> None:
    """Random weights differ between device types, so both sessions take the tensors that the CPU made."""
    info = make_random(*flags, "--use_gpt_attention_plugin")
    oracle = open_session(info)
    weights = {name: tensor.cuda() for name, tensor in oracle.ops.weights.items()}
    session = TorchSession(info.model, info.build, Mapping(), weights, "cuda")
    prompts = random_prompts(LENGTHS, 91)
    assert relative_error(steps(session, prompts), steps(oracle, prompts)) < 1e-5


@pytest.fixture
def make_random(tmp_path: Path) -> Callable[..., EngineInfo]:
    sizes = ["--n_layer", "2", "--n_embd", "64", "--n_head", "4", "--vocab_size", "91", "--n_positions", "64"]

    def make(*flags: str) -> EngineInfo:
        return build_engine(None, tmp_path / "random", *sizes, "--dtype", "float32", "--random_seed", "5", *flags)

    return make
