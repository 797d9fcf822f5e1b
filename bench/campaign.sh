#!/usr/bin/env bash
# Measures everything on this machine's accelerator, most valuable first, in at most so many minutes:
#
#     bash bench/campaign.sh [minutes] [flags of `python -m bench.campaign`]
#
# Needs Python with jax, flax, optax, orbax-checkpoint, sentencepiece, pyarrow, pytest, pytest-benchmark and
# pytest-timeout. Wheels of what else is wanted, such as jax-triton and tokamax, are installed from the folder `wheels`,
# if there is one, without a network. Where the files are no git checkout, PI0FAST_COMMIT says which commit they are of.
set -euo pipefail
cd "$(dirname "$0")/.."
began="$(date +%s)"
minutes=10
if [[ "${1:-}" =~ ^[0-9.]+$ ]]; then
  minutes="$1"
  shift
fi

python="${PYTHON:-python3}"
site="$PWD"
if compgen -G "wheels/*.whl" > /dev/null; then
  target="$(mktemp -d)"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$target" wheels/*.whl
  site="$target:$site"
fi
export PYTHONPATH="$site:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m bench.campaign --minutes="$minutes" --began="$began" "$@"
