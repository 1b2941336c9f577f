#!/usr/bin/env bash
# Runs NVIDIA's perf_analyzer against a daemon of its own. It comes in the x86-64 wheel tritonclient==2.44.0
# (newer wheels lack it) and needs libb64 and the CUDA runtime's library, but no GPU.
set -eu
cd "$(dirname "$0")/.."
[[ -e .venv/perf ]] || { .venv/bin/python -m venv .venv/perf
  .venv/perf/bin/python -m pip install --quiet --no-deps tritonclient==2.44.0 nvidia-cuda-runtime-cu12; }
ldconfig -p | grep -q libb64.so.0d || { echo "libb64 is missing; run: sudo apt-get install libb64-0d"; [[ $(id -u) == 0 ]] && apt-get install -y -qq libb64-0d >/dev/null; }
site=$(.venv/perf/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
analyzer=$(find .venv/perf -name perf_analyzer -type f | tail -n 1)
chmod +x "$analyzer"
place=$(mktemp -d)
printf '[server]\nsocket = "%s/e.sock"\ntcp = "127.0.0.1:18411"\n' "$place" > "$place/edge.toml"
.venv/bin/edge-runtime serve --config "$place/edge.toml" 2> "$place/log" &
daemon=$!
trap 'kill $daemon; rm -rf "$place"' EXIT
until grep -q '^ready' "$place/log"; do kill -0 $daemon; done
LD_LIBRARY_PATH=$site/nvidia/cuda_runtime/lib "$analyzer" -m commands -i http -u 127.0.0.1:18411 \
  --shape text:1 --string-data "turn off the light" --concurrency-range "${1:-1:32:31}" --measurement-interval 2000
