"""Several ranks as their users start them: the README's SantaCoder commands, and launches that lack what they need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from calibration_models import tiny_bigcode
from engines import build_engine
from ranks import environment, mpirun, run_program

import build
import hf_gpt_convert
from gpt.comm import NullCommunicator
from gpt.comm_nccl import NcclCommunicator
from gpt.errors import ConfigError

pytestmark = pytest.mark.mpi


def run_script(*words: object) -> str:
    result = run_program([sys.executable, *map(str, words)], environment())
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_santacoder_on_four_ranks(tmp_path: Path) -> None:
    hf, ft = tiny_bigcode(tmp_path / "santacoder", n_embd=64, n_head=8), tmp_path / "c-model" / "santacoder"
    texts = []
    for ranks in (1, 4):
        engine = tmp_path / f"santacoder_outputs_tp{ranks}"
        convert = ["-p", 8, "--model", "santacoder", "-i", hf, "-o", ft, "--storage-type", "float16"]
        assert hf_gpt_convert.main([*map(str, convert), "--tensor-parallelism", str(ranks)]) == 0
        plugins = ["--use_gpt_attention_plugin", "--enable_context_fmha", "--use_layernorm_plugin", "--use_gemm_plugin"]
        flags = ["--model_dir", ft / f"{ranks}-gpu", *plugins, "--parallel_build", "--world_size", ranks]
        assert build.main([*map(str, flags), "--max_input_len", "30", "--output_dir", str(engine)]) == 0
        run = ["run.py", "--engine_dir", engine, "--tokenizer", hf, "--input_text", "def print", "--max_output_len", 20]
        if ranks == 1:
            texts.append(run_script(*run))
        else:
            result = mpirun(ranks, *run)
            assert result.returncode == 0, result.stderr
            texts += [result.stdout, run_script(*run, "--spawn")]
    assert texts[0].startswith('Input: "def print"\nOutput: "')
    assert texts == [texts[0]] * 3


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--vocab_size", "64", "--world_size", "2"]
    return build_engine(None, tmp_path_factory.mktemp("engine") / "e", *sizes).folder


def test_mpi_that_is_not_installed(two_ranks: Path) -> None:
    program = "import sys; sys.modules['mpi4py'] = None; import run; sys.exit(run.main(sys.argv[1:]))"
    result = mpirun(2, "-c", program, "--engine_dir", two_ranks, "--max_output_len", 2)
    assert result.returncode == 2
    assert result.stderr.count("error: several ranks were started, but MPI cannot be loaded") == 1
    assert "pip install mpi4py mpich" in result.stderr


def test_ranks_that_mpi_does_not_connect_get_one_message(two_ranks: Path) -> None:
    """MPI's own packages have nothing to add."""
    alone = environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0")
    words = [sys.executable, "run.py", "--engine_dir", str(two_ranks), "--max_output_len", "2"]
    result = run_program(words, alone)
    assert result.returncode == 2
    assert result.stderr.startswith("error: MPI did not connect the ranks")


def test_nccl_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="GPU ranks need NCCL"):
        NcclCommunicator(NullCommunicator(), None)  # type: ignore[arg-type]
