"""Wall time of `run.py` as a process beside the equivalent `transformers` script, run in turn.

python3 benchmarks/bench_process.py --engine_dir quickstart/engine --model_dir assets/gpt2-tiny
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS, Sample, append_csv, describe_device, describe_versions

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Born in north-east France, Soyer trained as a"
HF_SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, num_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
inputs = tokenizer(prompt, return_tensors="pt")
with torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", required=True)
    parser.add_argument("--model_dir", required=True, help="the Hugging Face folder the engine was made from")
    parser.add_argument("--output_len", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--csv", type=Path, default=RESULTS / "process.csv")
    args = parser.parse_args()
    length = str(args.output_len)
    ours = [
        sys.executable,
        "run.py",
        "--engine_dir",
        args.engine_dir,
        "--max_output_len",
        length,
        "--input_text",
        PROMPT,
    ]
    theirs = [sys.executable, "-c", HF_SCRIPT, args.model_dir, PROMPT, length]
    texts = [timed(command)[1] for command in (ours, theirs)]  # not counted: fills the page cache
    print("".join(texts))
    same = texts[1].strip() in texts[0]
    rounds = [(timed(ours)[0], timed(theirs)[0]) for _ in range(args.repeat)]
    our_s, their_s = Sample([a for a, _ in rounds]), Sample([b for _, b in rounds])
    ratio = Sample([a / b for a, b in rounds])
    print(f"run.py {our_s} s, transformers {their_s} s, ratio {ratio}, same text {same}")
    row = {
        "device": describe_device(),
        "versions": describe_versions("torch", "transformers", "tokenizers"),
        "output_len": args.output_len,
        "repeat": args.repeat,
        "run_py_s": round(our_s.median, 3),
        "transformers_s": round(their_s.median, 3),
        "ratio_median": round(ratio.median, 3),
        "ratio_min": round(min(ratio.values), 3),
        "ratio_max": round(max(ratio.values), 3),
        "same_text": same,
    }
    append_csv(args.csv, [row])


def timed(command: list[str]) -> tuple[float, str]:
    begin = time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return time.perf_counter() - begin, result.stdout


if __name__ == "__main__":
    main()
