#!/usr/bin/env bash
# Remakes both shipped bundles from CLINC150: make models DATA=path/to/data_full.json
set -euo pipefail
data=${DATA:?set DATA to the data_full.json of CLINC150 (https://github.com/clinc/oos-eval); its test rows are never read}
mkdir -p build
.venv/bin/python -m tools.train_cloud --data "$data" --checkpoint build/cloud.pt --out models/commands-cloud
.venv/bin/python -m tools.train_edge --data "$data" --teacher models/commands-cloud \
  --teacher-cache build/teacher.npy --out models/commands
.venv/bin/python -m tools.sign_models
