#!/usr/bin/env bash
# Remakes the shipped bundles of CLINC150: make models DATA=path/to/data_full.json
# With SNIPS=folder of the published train_<Intent>_full.json files, commands-slots too.
# A stopped run continues when it is started again; its state is in build/.
set -euo pipefail
data=${DATA:?set DATA to the data_full.json of CLINC150 (https://github.com/clinc/oos-eval); its test rows are never read}
python=.venv/bin/python
licence='Apache-2.0; trained on CLINC150 (CC-BY-3.0)'
credit='CLINC150|Stefan Larson, Anish Mahendran, Joseph J. Peper, Christopher Clarke, Andrew Lee, Parker Hill, Jonathan K. Kummerfeld, Kevin Leach, Michael A. Laurenzano, Lingjia Tang, Jason Mars (2019)|CC-BY-3.0|https://github.com/clinc/oos-eval'
train() {
  "$python" -m tools.train_commands build/clinc.jsonl --name commands --licence "$licence" --credit "$credit" "$@"
}
mkdir -p build
"$python" -m tools.clinc "$data" build/clinc.jsonl
train --tier cloud --members 2 --distil --seed 1 --out models/commands-cloud --work build/cloud.work --report build/cloud-report
train --tier edge --teacher ./models/commands-cloud --out models/commands --work build/edge.work --report build/edge-report
"$python" -m tools.fuse models/commands build/clinc.jsonl --split val --cloud models/commands-cloud
if [ -n "${SNIPS:-}" ]; then
  "$python" -m tools.snips "$SNIPS" build/snips.jsonl
  "$python" -m tools.train_slots build/snips.jsonl --checkpoint build/slots --out models/commands-slots
fi
"$python" -m tools.sign_models
