"""From an engine folder to a session that runs."""

from __future__ import annotations

import time

import torch

from gpt.checkpoint.random_weights import RandomWeights
from gpt.comm import Communicator
from gpt.console import human_bytes, log
from gpt.dtypes import dtype_name
from gpt.engine.device_load import read_into_device
from gpt.engine.folder import EngineInfo
from gpt.engine.tensor_file import map_tensor_file
from gpt.engine.weights import engine_tensors, file_layout
from gpt.errors import ConfigError, EngineError, first_lines
from gpt.mapping import Mapping
from gpt.runtime.execution import DEFAULT_EXECUTION, Execution
from gpt.runtime.ranks import join_ranks, place_on_gpu
from gpt.runtime.session import Session
from gpt.runtime.torch_session import TorchSession


def load_session(info: EngineInfo, device: str = "auto", execution: Execution = DEFAULT_EXECUTION) -> Session:
    """Loads this process's rank of an engine on `device`: auto, cpu, cuda or, for an engine of one rank, cuda:N.

    Raises ConfigError for a device that is not there, for a launch of another number of ranks than the engine's and for
    what its backend cannot honour, EngineError for an engine that cannot be loaded.
    """
    if execution.batch_invariant and info.backend != "torch":
        raise ConfigError(
            "--batch_invariant needs kernels whose sums are known",
            found=f"a {info.backend} engine",
            hint="build.py without --backend tensorrt",
        )
    ranks = join_ranks(info)
    mapping = Mapping.of_build(info.build, ranks.rank)
    begin = time.perf_counter()
    session: Session
    target = pick_device(device)
    if ranks.size > 1:
        target = device_of_rank(target, ranks)
        ranks = place_on_gpu(ranks, target if target.type == "cuda" else None)
    if info.backend == "tensorrt":
        from gpt.runtime.trt_session import TrtSession

        path = info.engine_path(mapping.rank)
        session = TrtSession.from_plan(
            path,
            info.model,
            info.build,
            mapping,
            target,
            library=info.library,
            comm=ranks,
            graphs=execution.cuda_graphs,
        )
    else:
        weights = load_torch_weights(info, mapping, target)
        session = _torch_session(info, mapping, weights, target, ranks, execution)
    log.info("Engine loaded: %s on %s, %.2f s", info.describe(), session.device, time.perf_counter() - begin)
    return session


def _torch_session(
    info: EngineInfo,
    mapping: Mapping,
    weights: dict[str, torch.Tensor],
    device: torch.device,
    comm: Communicator,
    execution: Execution,
) -> Session:
    if device.type == "cuda":
        from gpt.engine.tuning import Tuning, tuning_path
        from gpt.runtime.cuda_session import CudaSession, kernels_know  # Triton comes with PyTorch for CUDA

        # How several ranks add depends on the size of what they add, how products that quantise their inputs divide
        # their sums on the number of rows: there, each sequence is alone.
        divided = mapping.world_size > 1 or info.build.quant.activations is not None
        if kernels_know(info.build.quant, device) and not (execution.batch_invariant and divided):
            return CudaSession(
                info.model,
                info.build,
                mapping,
                weights,
                device,
                comm,
                graphs=execution.cuda_graphs,
                tuning=Tuning.load(tuning_path(info.folder, device), device),
                batch_invariant=execution.batch_invariant,
            )
    if not execution.cuda_graphs:
        log.warning("--no_cuda_graphs has no effect: this engine's steps on %s are not recorded anyway", device)
    return TorchSession(
        info.model, info.build, mapping, weights, device, comm, batch_invariant=execution.batch_invariant
    )


def device_of_rank(device: torch.device, ranks: Communicator) -> torch.device:
    """The GPU of this rank among those that `device`, as `pick_device` gave it, means."""
    if device.type != "cuda":
        return device
    if str(device) != "cuda":
        raise ConfigError(
            "several ranks cannot share one GPU", found=f"--device {device}", allowed="auto, cpu, cuda: each its own"
        )
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def load_torch_weights(info: EngineInfo, mapping: Mapping, device: torch.device) -> dict[str, torch.Tensor]:
    """One rank's weights on `device`: on a CPU views of the mapped file, or made from the seed of a random-weight
    engine."""
    if info.build.seed is not None:
        source = RandomWeights(info.model, info.build.seed, device)
        return dict(engine_tensors(info.model, info.build, mapping, source))
    path = info.engine_path(mapping.rank)
    weights, metadata = map_tensor_file(path)
    if metadata.get("build_id") != info.build_id:
        raise EngineError(
            f"{path} does not belong to the config.json beside it",
            found=f"build {metadata.get('build_id')} of the file, {info.build_id} of config.json",
            hint="build the engine again with build.py",
        )
    expected = file_layout(info.model, info.build, mapping)
    found = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in weights.items()}
    if found != expected:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise EngineError(
            f"{path} does not hold the tensors of its model",
            found=first_lines([f"{name}: {found.get(name)}, expected {expected.get(name)}" for name in different]),
            hint="build the engine again with build.py",
        )
    if device.type == "cpu":
        return weights
    needed = path.stat().st_size
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise ConfigError(
            f"the weights do not fit on {device}",
            found=f"{human_bytes(needed)} of weights, {human_bytes(free)} free",
            hint="free the card, choose another --device, or use --device cpu",
        )
    return map_tensor_file(path, read_into_device(path, device))[0]


def pick_device(device: str) -> torch.device:
    """'auto' is the first GPU where there is one.  Raises ConfigError for a device that does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError("unknown device", found=device, allowed="auto, cpu, cuda, cuda:N")
    if chosen.type == "cuda":
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= num_gpus:
            raise ConfigError(
                f"there is no {device} here",
                found=f"{num_gpus} usable GPUs",
                allowed="auto, cpu, cuda:N with N below that",
            )
    return chosen
