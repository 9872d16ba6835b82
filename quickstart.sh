#!/bin/sh
# From a trained GPT-2 to text and ROUGE scores: converts, builds, runs and scores the model that comes with this project.
#
# usage: sh quickstart.sh [--no-install]
#
# Everything it writes is in quickstart/ and in the virtual environment (see environment.sh for VENV and PYTHON).
# --no-install runs with $PYTHON (default: python3) as it is and installs nothing.
set -eu
. "$(dirname -- "$0")/environment.sh"

case $# in
    0) ;;
    *) [ "$*" = --no-install ] || fail "unknown argument" "$*" "sh quickstart.sh [--no-install]" ;;
esac
use_environment requirements.txt "$@"
rm -rf quickstart/c-model quickstart/engine quickstart/report.html

show "$python" hf_gpt_convert.py -i assets/gpt2-tiny -o quickstart/c-model -t float32

show "$python" build.py --model_dir quickstart/c-model/1-gpu --output_dir quickstart/engine \
    --max_batch_size 8 --max_input_len 412 --max_output_len 100

show "$python" run.py --engine_dir quickstart/engine --max_output_len 20 \
    --input_text "The Babeltrace 2 project offers a library with a C API, Python 3 bindings, and a command-line tool. This package provides Python 3 bindings for libbabeltrace2. TL;DR:"

show "$python" summarize.py --engine_dir quickstart/engine --hf_model_location assets/gpt2-tiny \
    --test_hf --test_trt_llm --dataset_path assets/articles.jsonl --batch_size 8 --output_len 40 \
    --report quickstart/report.html

printf '\nDone. The articles, both summaries and their scores side by side: quickstart/report.html\n'
