"""Every command of bench/README.md by the name of its table, with what makes it quick.

A new table is one line here and its command on the page; tests/bench/test_all.py compares the two.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

# Sizes with which a program shows that it works, added to a command; of an option given twice the last one counts.
_SLEEPING = "--ranks 2 --layers 2 --micro-batches 8 --ms 1 1 1 --rounds 1"
_TWO = f"{_SLEEPING} --contenders 1f1b v-half"
_MEMORY = "--layers 2 --micro-batches 2 --hidden 64 --length 64 --contenders v-zb --checkpointing off"
_PACKING = "--rounds 1 --batches 1 --length 64 --rows 2 --micro-batches 2 --layers 4 --hidden 32"
_MIXED = "--ranks 2 --micro-batches 6 --sigma 0.7 --rounds 2 --schedules v-half"
_HEAD = "--ranks 2 --layers 2 --micro-batches 2 --hidden 64 --length 64 --vocabulary 256"
_WHOLE = ("--cases v-half-2-replicas v-zb-post-validation --layers 2 --micro-batches 2 --hidden 64 --length 64 "
          "--batches 3")
_PLAN = "--time-limit 1 --stages 8 --micro-batches 16"
_PAPER = "--models 9.6B --micro-batches-per-rank 2 --schedules 1f1b v-half"
_SPLIT = "--rounds 1 --hidden 64 --length 16 --samples 1"
_SUMS = "--rounds 1 --sizes 64x64 --tokens 64"
# Of any quick command: what stands for a GPU, and for the schedules of another scheduler.
_INSTEAD = {"cuda": "cpu", "schedules.json": "tests/data/reference.json"}

_NAMED = "1f1b zb-h1 v-min v-half v-zb"
_OURS = f"{_NAMED} adaptive@0.75 adaptive@1.0"
_TORCHS = ('"torch 1f1b" "torch interleaved1f1b" "torch interleavedzerobubble" "torch zbvzerobubble" '
           '"torch dualpipev"')
_CHUNKS = ('"torch interleavedzerobubble" "torch interleavedzerobubble:4" '
           "interleaved-zb interleaved-zb:4 v-zb v-zb:4")
_BY_HEAD = "--contenders v-half --checkpointing off --partition blocks multiplications times"
_GPU_SUMS = ("--device cuda --dtype bfloat16 --sums float32 --tokens 2048 4096 "
             "--sizes 4096x4096 12288x4096 16384x4096 4096x16384 20480x5120")
_GPU_SPLIT = "--device cuda --dtype bfloat16 --sums float32 --hidden 4096 5120 --length 2048 4096 --samples 1"
_PLANS = "--plans runs/bench/plans"
_HALF = "-m ds_vshape plan --schedule adaptive --memory-limit 0.5 --times 10,12,8,1"


@dataclass(frozen=True)
class Run:
    """`command` is what follows `python` on the page; with `quick` at its end it only shows that it works."""

    name: str
    command: str
    quick: str

    @property
    def words(self) -> list[str]:
        """The command as on the page."""
        return shlex.split(self.command)

    @property
    def quick_words(self) -> list[str]:
        """The same with small sizes, for any machine."""
        return [_INSTEAD.get(word, word) for word in self.words] + shlex.split(self.quick)


_EIGHT = "--ranks 8 --layers 2 --micro-batches 16"
RUNS = [
    Run("sleeping", 'bench/run.py --rounds 3 --micro-batches 8 16 32 '
                    f'--contenders "deepspeed 1f1b" "deepspeed dualpipev" {_OURS}',
        f'{_SLEEPING} --contenders "deepspeed 1f1b" "deepspeed dualpipev" {_NAMED}'),
    Run("sleeping-20ms", 'bench/run.py --rounds 1 --ms 20 20 20 --micro-batches 8 16 32 '
                         f'--contenders "deepspeed 1f1b" {_OURS}', _TWO),
    Run("sleeping-8-ranks", 'bench/run.py --ranks 8 --layers 2 --micro-batches 16 --rounds 2 --ms 20 20 20 '
                            f'--contenders "deepspeed 1f1b" {_NAMED}', _TWO),
    Run("sleeping-torch", 'bench/run.py --rounds 3 --micro-batches 8 '
                          f'--contenders "deepspeed 1f1b" {_TORCHS} v-zb adaptive@1.0',
        f"{_SLEEPING} --contenders 1f1b {_TORCHS}"),
    Run("sleeping-chunks", 'bench/run.py --rounds 3 --micro-batches 8 16 --ms 20 20 20 '
                           f'--contenders {_CHUNKS}',
        f"{_SLEEPING} --layers 4 --contenders {_CHUNKS}"),
    Run("sleeping-chunks-planned", "bench/run.py --rounds 2 --micro-batches 8 --ms 20 20 20 --planning-seconds 5 "
                                   "--contenders v-zb v-zb:4 adaptive@0.75 adaptive:4@0.75 adaptive:4@1.0",
        f"{_SLEEPING} --layers 4 --planning-seconds 1 --contenders v-zb:4 adaptive:4@0.75"),
    Run("gpt", 'bench/run.py --workload gpt --ranks 2 --micro-batches 4 8 --rounds 5 '
               '--contenders "deepspeed 1f1b" "torch zbvzerobubble" 1f1b zb-h1 v-half v-zb', f"{_TWO} --hidden 64"),
    Run("measured-times", 'bench/run.py --rounds 3 --micro-batches 8 --ms 5 8 3 '
                          '--contenders "deepspeed 1f1b" v-half v-half@profile adaptive@0.75',
        f"{_SLEEPING} --contenders 1f1b v-half@profile adaptive@0.75"),
    Run("unequal", f"bench/unequal.py {_PLANS}",
        "--cases head slow-rank --ranks 2 --micro-batches 4 --layers 4 --seconds 0.1"),
    Run("unequal-sleeping", f"bench/unequal.py {_PLANS} --rounds 2",
        "--cases head --ranks 2 --micro-batches 4 --layers 4 --seconds 0.1 --rounds 1"),
    Run("two-hosts", "bench/cluster.py --rounds 5",
        "--wire 0 --layers 2 --micro-batches 4 --ms 1 1 1 --rounds 1 --contenders 1f1b v-half"),
    Run("bandwidth", "bench/bandwidth.py",
        "--megabits 200 800 --layers 2 --ms 1 1 1 --width 96 --memory-width 128 --rounds 1 --micro-batches 8"),
    Run("consecutive", "bench/consecutive.py --batches 8 --rounds 1", f"{_SLEEPING} --batches 2"),
    Run("consecutive-some-clipped", "bench/consecutive.py --batches 20 --rounds 1 --clipped 0.05",
        f"{_SLEEPING} --batches 2 --clipped 0.5"),
    Run("consecutive-all-clipped", "bench/consecutive.py --batches 8 --rounds 1 --clipped 1",
        f"{_SLEEPING} --batches 2"),
    Run("consecutive-8-ranks", f"bench/consecutive.py {_EIGHT} --batches 8 --rounds 1", f"{_SLEEPING} --batches 2"),
    Run("consecutive-8-ranks-all-clipped", f"bench/consecutive.py {_EIGHT} --batches 8 --rounds 1 --clipped 1",
        f"{_SLEEPING} --batches 2"),
    Run("consecutive-50ms", "bench/consecutive.py --batches 6 --rounds 1 --ms 50 50 50", f"{_SLEEPING} --batches 2"),
    Run("packing", "bench/packing.py --rounds 8", _PACKING),
    Run("packing-conversations", "bench/packing.py --lengths conversations", _PACKING),
    Run("mixed-simulated", "bench/mixed_lengths.py --simulate --ranks 4 4 8 --micro-batches 8 16 32 --sigma 0.5 1 "
                           "--rounds 30", _MIXED),
    Run("mixed-sleeping", "bench/mixed_lengths.py --ms 60 60 60 --rounds 6 --schedules 1f1b v-half v-zb",
        f"{_MIXED} --ms 1 1 1"),
    Run("partitions", "bench/partitions.py --seconds 3",
        "--ranks 2 --micro-batches 4 --layers 6 --heads 8 --limits 0.7 --seconds 0.1"),
    Run("partitions-exhaustive", "bench/partitions.py --exhaustive --ranks 2 4 --layers 8 --micro-batches 4 "
                                 "--limits 0.6 1 --seconds 2", "--ranks 2 --layers 4 --heads 8 --seconds 0.1"),
    Run("partitions-sleeping", "bench/partitions.py --ranks 4 --micro-batches 8 --heads 8 --limits 0.5 --seconds 2 "
                               "--sleep 2 --rounds 2", "--ranks 2 --layers 4 --limits 0.7 --seconds 0.1 --sleep 0.1"),
    Run("memory", 'bench/memory.py --contenders "torch zbvzerobubble" 1f1b v-zb v-half v-min adaptive@0.75 '
                  'adaptive@0.5', _MEMORY),
    Run("memory-head", f"bench/memory.py --head whole {_BY_HEAD}", _HEAD),
    Run("memory-head-chunked", f"bench/memory.py --head chunked {_BY_HEAD}", _HEAD),
    Run("whole-rank", "bench/whole_rank.py", _WHOLE),
    Run("memory-on-demand", "bench/run.py --workload holding --ranks 8 --layers 2 --micro-batches 32 --ms 30 30 30 "
                            "--rounds 1 --planning-seconds 60 "
                            "--contenders v-zb 1f1b adaptive+offload@0.3 adaptive+recompute+offload@0.2",
        f"{_SLEEPING} --planning-seconds 1 --contenders v-zb adaptive+recompute+offload@0.3"),
    Run("memory-on-demand-60ms", "bench/run.py --workload holding --ranks 8 --layers 2 --micro-batches 32 "
                                 "--ms 60 60 60 --rounds 1 --planning-seconds 40 "
                                 "--contenders v-zb adaptive+offload@0.3 adaptive+recompute+offload@0.2",
        f"{_SLEEPING} --planning-seconds 1 --contenders v-zb adaptive+offload@0.3"),
    Run("memory-on-demand-4-ranks", "bench/run.py --workload holding --ranks 4 --layers 2 --micro-batches 32 "
                                    "--ms 60 60 60 --rounds 1 --planning-seconds 20 "
                                    "--contenders v-zb adaptive+offload@0.3",
        f"{_SLEEPING} --planning-seconds 1 --contenders v-zb adaptive+offload@0.3"),
    Run("reference", "bench/compare_reference.py schedules.json", ""),
    Run("reference-plans", "bench/compare_reference.py schedules.json --time-limit 8",
        "--time-limit 0.01 --peaks-of v-half"),
    Run("reference-v-min", "bench/compare_reference.py schedules.json --time-limit 25 --peaks-of v-min",
        "--time-limit 0.01"),
    Run("optimum-batch", "bench/optimum.py batch --ranks 4 --micro-batches 8 --peak 4 --times 10,20,10,1",
        "--ranks 2 --micro-batches 2 --seconds 1"),
    Run("optimum-block", "bench/optimum.py block --ranks 4 --peak 4 --times 10,9,7,3 --intervals 68 69",
        "--seconds 1"),
    Run("optimum-group", "bench/optimum.py block --ranks 8 --peak 8 --times 10,9,7,3 --group 3", "--seconds 1"),
    Run("plan-8", f"{_HALF} --stages 8 --micro-batches 32 --time-limit 8", _PLAN),
    Run("plan-32", f"{_HALF} --stages 32 --micro-batches 128 --time-limit 55", _PLAN),
    Run("plan-64", f"{_HALF} --stages 64 --micro-batches 256 --time-limit 120", _PLAN),
    Run("split", "bench/split_cost.py --rounds 24", _SPLIT),
    Run("split-embedding", "bench/split_cost.py --layer embedding --hidden 512 --samples 1", _SPLIT),
    Run("sums-fp32", "bench/accumulation.py --rounds 20 --dtype float32", _SUMS),
    Run("sums-bf16", "bench/accumulation.py --rounds 20 --dtype bfloat16", _SUMS),
    Run("sums-gpu", f"bench/accumulation.py {_GPU_SUMS}", _SUMS),
    Run("split-gpu", f"bench/split_cost.py {_GPU_SPLIT}", _SPLIT),
    Run("paper", "bench/scale.py paper --models 9.6B 21B 38.5B", _PAPER),
    Run("paper-98.5B", "bench/scale.py paper --models 98.5B --samples 1 --micro-batches-per-rank 2 4", _PAPER),
    Run("grid", "bench/scale.py grid", "--schedules v-half --samples 4"),
    Run("grid-3072", "bench/scale.py grid --length 3072 --batch 640 --samples 1 --schedules 1f1b v-half v-zb",
        "--model 9.6B --batch 64 --schedules v-half"),
    Run("hops", "-m ds_vshape plan --stages 16 --micro-batches 32 --schedule v-half --times 1,1,1,0.5 "
                "--compare 1f1b,zb-h1,v-half", "--stages 4 --micro-batches 8"),
    Run("host", "bench/scale.py host --ranks 64 --micro-batches 1024 --schedules 1f1b zb-h1 zb-h2 interleaved-1f1b "
                "interleaved-zb 1f1b-v v-min v-half v-zb zb-v", "--ranks 2 --micro-batches 8"),
    Run("host-256", "bench/scale.py host --ranks 256 --micro-batches 4096", "--ranks 2 --micro-batches 8"),
    Run("host-measured", "bench/scale.py host --measure", "--ranks 2 --micro-batches 8"),
    Run("instructions", "bench/instructions.py --places 20", "--micro-batches 4 --batches 2"),
    Run("ranks", "bench/scale.py ranks --time-limit 420", "--ranks 2 4 --schedules v-half"),
]
