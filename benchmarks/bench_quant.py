"""Decoding with quantised weights beside our own bfloat16, and beside CTranslate2's int8 where its Python is named.

    python3 benchmarks/bench_quant.py --peer_python VENV/bin/python

Random GPT-2 of 12 x 768 with 8192 tokens, 128 in, 64 out, batch 1, greedy, unless told otherwise.  All modes and the
peer take turns, round by round; ratios are of one round.  The peer (`pip install ctranslate2` in an environment of its
own) runs in a second process with as many threads, which waits while it is not its turn.

Two clocks: the wall's, and the processor time of the process (`cpu`), which with one thread is the same on a quiet
machine and does not count, on a busy one, the time in which others ran.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

THIS = Path(__file__).resolve()
QUANTITIES = ("prefill_ms", "token_ms", "prefill_cpu_ms", "token_cpu_ms")
Run = Callable[[], dict[str, float]]  # one measurement of each quantity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--input_len", type=int, default=128)
    parser.add_argument("--output_len", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--modes", nargs="+", help="default: all")
    parser.add_argument("--peer_python")
    parser.add_argument("--serve_peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.serve_peer:
        serve_peer(args)
        return
    measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    from common import RESULTS, Sample, append_csv, describe_device, describe_versions

    runs = our_runs(args)
    with contextlib.ExitStack() as stack:
        if args.peer_python:
            runs["CTranslate2 int8"] = stack.enter_context(peer(args))
        for run in runs.values():
            run()  # warms up
        rounds = [{name: run() for name, run in runs.items()} for _ in range(args.repeat)]
    rows: list[dict[str, object]] = []
    for quantity in QUANTITIES:
        for name in runs:
            ms = Sample([times[name][quantity] for times in rounds])
            to_float = Sample([times[name][quantity] / times["bfloat16"][quantity] for times in rounds])
            row: dict[str, object] = {
                "device": describe_device(),
                "versions": describe_versions("torch"),
                "threads": args.threads,
                "model": f"{args.n_layer}x{args.n_embd}x{args.vocab_size}",
                "input_len": args.input_len,
                "output_len": args.output_len,
                "repeat": args.repeat,
                "quantity": quantity,
                "mode": name,
                "ms_median": round(ms.median, 3),
                "ms_min": round(min(ms.values), 3),
                "ms_max": round(max(ms.values), 3),
                "over_bfloat16": round(to_float.median, 3),
                "over_bfloat16_min": round(min(to_float.values), 3),
                "over_bfloat16_max": round(max(to_float.values), 3),
                "over_peer": "",
                "over_peer_min": "",
                "over_peer_max": "",
            }
            if args.peer_python:
                to_peer = Sample([times[name][quantity] / times["CTranslate2 int8"][quantity] for times in rounds])
                row["over_peer"] = round(to_peer.median, 3)
                row["over_peer_min"] = round(min(to_peer.values), 3)
                row["over_peer_max"] = round(max(to_peer.values), 3)
            print(f"{quantity} {name}: {ms} ms, over bfloat16 {to_float}, over peer {row['over_peer']}", flush=True)
            rows.append(row)
    append_csv(args.csv or RESULTS / "quant_cpu.csv", rows)


def our_runs(args: argparse.Namespace) -> dict[str, Run]:
    """By mode."""
    import torch

    sys.path.insert(0, str(THIS.parent.parent))
    from gpt.checkpoint.random_weights import RandomWeights
    from gpt.config import BuildConfig, ModelConfig
    from gpt.engine.weights import engine_tensors
    from gpt.mapping import Mapping
    from gpt.quant import QuantConfig
    from gpt.runtime.generate import generate
    from gpt.runtime.request import Request
    from gpt.runtime.torch_session import TorchSession

    torch.set_num_threads(args.threads)
    model = ModelConfig(
        vocab_size=args.vocab_size,
        n_positions=args.input_len + args.output_len,
        n_embd=args.n_embd,
        n_head=args.n_head,
        n_layer=args.n_layer,
        n_kv_head=args.n_head,
        inter_size=4 * args.n_embd,
        hidden_act="gelu_new",
    )
    modes = {
        "bfloat16": QuantConfig(),
        "int8 weight-only": QuantConfig("int8"),
        "int4 weight-only, groups of 64": QuantConfig("int4", group_size=64),
        "SmoothQuant, per token and channel": QuantConfig("int8", "per_token", per_channel=True),
        "SmoothQuant, per tensor": QuantConfig("int8", "per_tensor"),
        "int8 weight-only, int8 cache": QuantConfig("int8", kv_cache="int8"),
    }
    prompt = torch.randint(0, args.vocab_size, (1, args.input_len), generator=torch.Generator().manual_seed(0)).tolist()

    def runner(quant: QuantConfig) -> Run:
        build = BuildConfig(
            dtype="bfloat16",
            max_input_len=args.input_len,
            max_output_len=args.output_len,
            gpt_attention_plugin="bfloat16",
            quant=quant,
            seed=1,
        )
        weights = dict(engine_tensors(model, build, Mapping(), RandomWeights(model, 1)))
        session = TorchSession(model, build, Mapping(), weights)
        return lambda: timed(lambda n: generate(session, Request(prompt, max_new_tokens=n)), args.output_len)

    wanted = ["bfloat16", *(args.modes or [name for name in modes if name != "bfloat16"])]
    return {name: runner(modes[name]) for name in wanted}


def timed(run: Callable[[int], object], num_tokens: int) -> dict[str, float]:
    """The QUANTITIES, a later token's from one run of one token and one of many."""
    clocks = (time.perf_counter, time.process_time)
    times = []
    for length in (1, num_tokens):
        begin = [clock() for clock in clocks]
        run(length)
        times.append([(clock() - start) * 1e3 for clock, start in zip(clocks, begin, strict=True)])
    later = [(many - one) / (num_tokens - 1) for one, many in zip(*times, strict=True)]
    return dict(zip(QUANTITIES, (times[0][0], later[0], times[0][1], later[1]), strict=True))


@contextlib.contextmanager
def peer(args: argparse.Namespace) -> Iterator[Run]:
    """The peer's process; each call runs it once."""
    sizes = ("n_layer", "n_embd", "n_head", "vocab_size", "input_len", "output_len", "threads")
    command = [args.peer_python, str(THIS), "--serve_peer"]
    for name in sizes:
        command += [f"--{name}", str(getattr(args, name))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run() -> dict[str, float]:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("no pipes")
            print("go", file=process.stdin, flush=True)
            return dict(zip(QUANTITIES, map(float, process.stdout.readline().split()), strict=True))

        yield run
        if process.stdin is not None:
            process.stdin.close()


def serve_peer(args: argparse.Namespace) -> None:
    """In the peer's environment: a random model of the same shape, timed once per line of stdin."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        save_peer_model(args, folder)
        generator = ctranslate2.Generator(
            folder, device="cpu", compute_type="int8", intra_threads=args.threads, inter_threads=1
        )
        prompt = [[f"t{index * 37 % args.vocab_size}" for index in range(args.input_len)]]

        def run(num_tokens: int) -> None:
            generator.generate_batch(
                prompt, max_length=num_tokens, min_length=num_tokens, sampling_topk=1, include_prompt_in_result=False
            )

        for _ in sys.stdin:
            print(*timed(run, args.output_len).values(), flush=True)


def save_peer_model(args: argparse.Namespace, folder: str) -> None:
    import numpy as np
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    spec = TransformerDecoderModelSpec.from_config(
        args.n_layer, args.n_head, pre_norm=True, activation=Activation.GELUTanh
    )
    random = np.random.default_rng(0)
    size = args.n_embd

    def fill(layer: object, num_out: int, num_in: int) -> None:
        layer.weight = random.normal(0, 0.02, (num_out, num_in)).astype(np.float32)  # type: ignore[attr-defined]
        layer.bias = np.zeros(num_out, np.float32)  # type: ignore[attr-defined]

    def norm(layer: object) -> None:
        layer.gamma, layer.beta = np.ones(size, np.float32), np.zeros(size, np.float32)  # type: ignore[attr-defined]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = random.normal(0, 0.02, (args.vocab_size, size)).astype(np.float32)
    positions = (args.input_len + args.output_len, size)
    decoder.position_encodings.encodings = random.normal(0, 0.02, positions).astype(np.float32)
    decoder.projection.weight = decoder.embeddings.weight
    norm(decoder.layer_norm)
    for layer in decoder.layer:
        norm(layer.self_attention.layer_norm)
        fill(layer.self_attention.linear[0], 3 * size, size)
        fill(layer.self_attention.linear[1], size, size)
        norm(layer.ffn.layer_norm)
        fill(layer.ffn.linear_0, 4 * size, size)
        fill(layer.ffn.linear_1, size, 4 * size)
    spec.register_vocabulary([f"t{index}" for index in range(args.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "t0"
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(folder)


if __name__ == "__main__":
    main()
