#!/usr/bin/env bash
# Trains one small GPT four times on four CPU ranks: with DeepSpeed's own 1F1B, then with three V schedules, which add one
# key to the same ds_config. Then checks that the losses are equal and prints one table.
#
#   bash launch/quickstart.sh            about three minutes on two cores, after the set-up
#   BATCHES=100 OUT=runs/long bash launch/quickstart.sh
#
# Logs and results stay in $OUT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_env.sh

BATCHES=${BATCHES:-40}
OUT=${OUT:-runs/quickstart}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# train SCHEDULE: one run; the progress bar goes to the terminal, the rest into a log.
train() {
    local result=$OUT/$1.json
    echo "== $1"
    rm -f "$result"
    if ! python launch/train.py schedule="$1" parallel.pipe=4 batches="$BATCHES" port="$(free_port)" \
        result="$PWD/$result" hydra.run.dir="$OUT/$1" > "$OUT/$1.log" || [ ! -s "$result" ]; then
        tail -n 40 "$OUT/$1.log" >&2
        echo "$1 failed; all it printed is in $OUT/$1.log" >&2
        exit 1
    fi
}

mkdir -p "$OUT"
SECONDS=0
results=()
for schedule in deepspeed v-zb v-half v-min; do
    train "$schedule"
    results+=("$OUT/$schedule.json")
done
python launch/compare.py "${results[@]}"
echo "Four runs in $SECONDS s."
