"""Memory that `llmga plan` predicts, beside what real runs of the same settings took.

    python benchmarks/plan_memory.py

Each case trains in processes of its own, with the ordinary script, on toy data and (but for the first) a random model
of about 0.1 billion parameters. Measured is the peak of the largest process's anonymous resident memory, looked at all
through the second step, when the optimizer's states are there, less that of a process that only imported the same
libraries. Pages of files are left out, those of the weights excepted: the system takes the libraries' away as it likes.
What is left holds a little that no plan has: the matrix library's work space, Python's own objects, and what the C
allocator keeps of freed memory. The last is taken out by telling the allocator to give every block of 64 KB and more
back when it is freed; one case is measured without that. On a GPU the same prediction is to be compared with `cuda_gb`
of metrics.jsonl, which counts what lives in the device's allocator.
Files go to a temporary folder (2 GB; --work names another place) and are deleted; the result goes to
benchmarks/results/plan_memory.json.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from llmga.machine import machine_in_words

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "plan_memory.json"
BASE = ROOT / "llmga/toyworld/checkpoints/base/mllm"
STEPS = 2  # that are looked at; optimizer states appear at the end of the first
IMPORTS = "import deepspeed, llmga.stage1.train; print(open('/proc/self/status').read())"
PLAIN_ALLOCATOR = "default allocator"
BIG = ["model.path={work}/model", "run.batch_size=2"]
LARGER = ["model.path={work}/model", "run.batch_size=4"]
CASES: dict[str, tuple[int, list[str]]] = {
    "toy, plain fp32": (1, ["run.batch_size=32"]),
    "0.1 B, plain fp32": (1, BIG),
    "0.1 B, plain fp32, larger batch": (1, LARGER),
    f"0.1 B, plain fp32, larger batch, {PLAIN_ALLOCATOR}": (1, LARGER),
    "0.1 B, fp32, gradient checkpointing": (1, [*LARGER, "run.gradient_checkpointing=true"]),
    "0.1 B, fp32, accumulation over 2": (1, [*BIG, "run.accumulation_steps=2"]),
    "0.1 B, plain bf16": (1, [*BIG, "run.precision=bf16"]),
    "0.1 B, plain fp32, logits of all tokens": (1, [*LARGER, "model.cross_entropy=full"]),
    "0.1 B, fp32, packed": (1, [*LARGER, "data.packing=true"]),
    "0.1 B, plain fp32, Muon": (1, [*BIG, "optim.matrix_lr=2e-3"]),
    "0.1 B, LoRA on a bf16 base": (1, [*BIG, "run.precision=bf16", "model.tags=text", "model.lora={{rank: 64}}"]),
    "0.1 B, projector alone": (1, [*LARGER, "model.trainable=projector"]),
    "0.1 B, DDP, 2 processes": (2, BIG),
    "0.1 B, ZeRO-2 bf16, 2 processes": (2, [*BIG, "run.precision=bf16", "run.deepspeed=configs/deepspeed/zero2.json"]),
    "0.1 B, ZeRO-3 bf16, 2 processes": (2, [*BIG, "run.precision=bf16", "run.deepspeed=configs/deepspeed/zero3.json"]),
}


def make_inputs(work: Path) -> None:
    """Toy data, and a random model as large as its name says with the toy tokenizer."""
    import torch
    from transformers import AutoConfig, LlavaForConditionalGeneration

    from llmga.stage1.model import load_processor
    from llmga.toyworld.build import build_world

    build_world(work / "world", rows=64, sheet=False)
    config = AutoConfig.from_pretrained(BASE)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 768, 2048, 12
    text.num_attention_heads = text.num_key_value_heads = 12
    text.head_dim, text.vocab_size, text.tie_word_embeddings = 64, 8192, False
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(work / "model")
    load_processor(BASE).save_pretrained(work / "model")


def settings(work: Path, name: str, overrides: list[str]) -> list[str]:
    """Overrides of configs/stage1/toy.yaml for one case."""
    return [
        f"data.sources.0.path={work}/world/train.jsonl",
        "data.validation=[]",
        f"run.max_steps={STEPS + 1}",  # so that nothing is saved while the last one is looked at
        "run.log_every_steps=1",
        "run.eval_every_steps=0",
        "run.sample_every_steps=0",
        "run.save_every_steps=0",
        "run.num_workers=0",
        "run.threads=1",
        f"run.output_dir={work}/runs/{name.replace(' ', '_')}",
        *(override.format(work=work) for override in overrides),
    ]


def predict(processes: int, overrides: list[str]) -> dict[str, Any]:
    """What the plan says of rank 0."""
    from llmga.config import load_config
    from llmga.stage1.config import Stage1Config
    from llmga.stage1.plan.architecture import read_architecture
    from llmga.stage1.plan.examples import plan_data
    from llmga.stage1.plan.memory import MemoryModel

    cfg = load_config(Stage1Config, ROOT / "configs/stage1/toy.yaml", overrides)
    data = plan_data(cfg, processes, num_looked=10**6)  # all of the run's examples
    assert data.longest is not None
    model = MemoryModel(cfg, read_architecture(cfg.model), processes)
    memory = model.at(data.longest)
    return {
        "parameters": {"trained": model.trained, "frozen": model.frozen},
        "longest_batch": [data.longest.rows, data.longest.tokens],
        "predicted_mb": round(memory.total / 1e6, 1),
        "parts_mb": {part: round(size / 1e6, 1) for part, size in memory.parts.items()},
        "moment": memory.moment,
    }


def measure(processes: int, overrides: list[str], baseline_mb: float, keeping: bool) -> float:
    """Train; the peak of rank 0 above the baseline, in MB.

    Args:
        keeping: let the C allocator keep what is freed, as it does by itself.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "scripts/train_stage1.py"]
    run = Path(next(one for one in overrides if one.startswith("run.output_dir=")).partition("=")[2])
    variables = {**environment(), **({} if keeping else {"MALLOC_MMAP_THRESHOLD_": "65536"})}
    log = run.parent.parent / f"{run.name}.log"
    with log.open("w") as stderr:
        started = psutil.Popen(
            [*command, "configs/stage1/toy.yaml", *overrides], cwd=ROOT, env=variables, stdout=stderr, stderr=stderr
        )
    peak = 0.0
    watched: dict[int, float] = {}  # process -> weights that it has mapped, in MB
    while (steps := steps_logged(run / "metrics.jsonl")) < STEPS:
        if started.poll() is not None:
            raise SystemExit(f"a run ended with exit code {started.returncode}:\n{log.read_text()[-3000:]}")
        if steps and not watched:  # before, weights turn from pages of their file into pages of the process
            for process in [started, *started.children(recursive=True)]:
                watched[process.pid] = mapped_weights_mb(Path(f"/proc/{process.pid}/smaps").read_text())
        for pid, mapped in watched.items():
            with contextlib.suppress(OSError):  # it has ended
                peak = max(peak, mapped + anonymous_mb(Path(f"/proc/{pid}/status").read_text()))
        time.sleep(0.02)
    for process in [*started.children(recursive=True), started]:
        process.kill()
    started.wait()
    return peak - baseline_mb


def steps_logged(metrics: Path) -> int:
    """How many steps a run has told of."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return sum('"loss"' in line for line in lines)


def anonymous_mb(status: str) -> float:
    """Resident memory of a process that no file stands for, in MB, from its /proc/PID/status."""
    return next((int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("RssAnon")), 0.0)


def mapped_weights_mb(smaps: str) -> float:
    """Resident pages of weight files, in MB: weights that nobody has written to are still the file's."""
    size, inside = 0, False
    for line in smaps.splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            inside = line.endswith(".safetensors")
        elif inside and name in ("Rss:", "Anonymous:"):
            size += int(values[0]) * (1 if name == "Rss:" else -1)
    return size * 1024 / 1e6


def environment() -> dict[str, str]:
    """One thread, this copy of the library, and no accelerator for DeepSpeed to look for."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def baseline_mb() -> float:
    """Anonymous resident memory of a process that only imported the libraries."""
    command = [sys.executable, "-c", IMPORTS]
    output = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout
    return anonymous_mb(output)


def main() -> None:
    """Every case, or those whose name holds --only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this; the others stay as they are")
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    cases = json.loads(args.out.read_text())["cases"] if args.only and args.out.exists() else {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        make_inputs(work)
        baseline = baseline_mb()
        for name, (processes, overrides) in CASES.items():
            if args.only not in name:
                continue
            settled = settings(work, name, overrides)
            case = predict(processes, [*settled, f"run.max_steps={STEPS}"])
            case["baseline_mb"] = round(baseline, 1)
            case["measured_mb"] = round(measure(processes, settled, baseline, PLAIN_ALLOCATOR in name), 1)
            case["predicted_over_measured"] = round(case["predicted_mb"] / case["measured_mb"], 3)
            cases[name] = {"processes": processes, "settings": overrides, **case}
            print(json.dumps({name: cases[name]}), flush=True)
    result = {
        "command": "python benchmarks/plan_memory.py",
        "machine": machine_in_words("torch", "transformers", note="no GPU"),
        "cases": {name: cases[name] for name in CASES if name in cases},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
