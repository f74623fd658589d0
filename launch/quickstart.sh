#!/usr/bin/env bash
# Trains one small GPT four times on four CPU ranks: with DeepSpeed's own 1F1B, then with three V schedules by adding one
# key to the same config. Then checks that the losses are equal and prints one table.
#
#   bash launch/quickstart.sh            about three minutes on two cores, after the set-up
#   BATCHES=100 OUT=runs/long bash launch/quickstart.sh
#
# Configs, logs and results stay in $OUT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_env.sh

BATCHES=${BATCHES:-40}
OUT=${OUT:-runs/quickstart}
STAGES=4
BASE=configs/quickstart.json

# One thread a rank: there are more ranks than cores.
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

# with_schedule NAME: the base config with the one key that chooses a schedule.
with_schedule() {
    python -c 'import hjson, json, sys; json.dump({**hjson.load(open(sys.argv[1])), "pipeline_schedule": sys.argv[2]}, sys.stdout, indent=2)' \
        "$BASE" "$1"
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# train NAME CONFIG: one run; the progress bar goes to the terminal, the rest into a log.
train() {
    local name=$1 config=$2
    echo "== $name"
    rm -f "$OUT/$name.json"
    # No hostfile: four processes on this machine.
    if ! deepspeed --hostfile /dev/null --num_gpus "$STAGES" --master_port "$(free_port)" launch/train.py \
        --deepspeed_config "$config" --batches "$BATCHES" --result "$OUT/$name.json" > "$OUT/$name.log" \
        || [ ! -s "$OUT/$name.json" ]; then
        tail -n 40 "$OUT/$name.log" >&2
        echo "$name failed; all it printed is in $OUT/$name.log" >&2
        exit 1
    fi
}

mkdir -p "$OUT"
SECONDS=0
train deepspeed "$BASE"
results=("$OUT/deepspeed.json")
for schedule in v-zb v-half v-min; do
    with_schedule "$schedule" > "$OUT/ds_config.$schedule.json"
    train "$schedule" "$OUT/ds_config.$schedule.json"
    results+=("$OUT/$schedule.json")
done
python launch/compare.py "${results[@]}"
echo "Four runs in $SECONDS s."
