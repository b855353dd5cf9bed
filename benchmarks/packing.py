"""Useful tokens per second of a training step: packed rows beside batches padded to the longest example.

    python benchmarks/packing.py

Every way trains one step on the same examples, in a process of its own, with the code of a run: collator, model, loss,
AdamW. Useful tokens are those of the examples, picture tokens included, padding not. One thread, and processor time is
counted, since the machine is shared. Three mixtures:

  mix665k   the parts and counts of LLaVA-1.5's instruction mixture as its paper lists them. The paper gives no lengths:
            they are assumed, log-normal per part, and stand in MIX665K below. 576 tokens a picture, at most 2048.
            The LLM is 512 wide with a vocabulary of 512, so that the head has 4 % of its arithmetic (2 % in a 7B
            model): a large head on a small model would make computing trained tokens alone look better than it is.
  toy       what `make stage1` trains on: data of data_tools/build_world.py, the shipped base model.
  head      the loss alone, 2048 tokens of which 3 in 10 are trained, a vocabulary of 128,256.

How much padding there is hangs on how many examples a forward pass has, and on who waits for whom: so a step of 128
examples of mix665k is divided as LLaVA-1.5 was tuned (8 devices, 16 examples a pass) and as LLMGA was (8 devices, 4
examples a pass, 4 passes). `times_faster` is that of one device which does all passes of the step one after the other.
`times_faster_together` is that of the 8 devices: all passes are timed here, and of those that run at the same time
the slowest counts, as under ZeRO-3, where devices meet in every layer. Packed rows are divided over the passes as a
run divides them (llmga.stage1.balance), here by their true lengths.

`tokens_ratio` is padded over useful tokens, what packing saves before any effect of attention or loss. Ways:

  padded         to the longest example, logits of every token: the published trainer
  padded_chunked the same with the loss on trained tokens alone
  packed_dense   one row, transformers' own SDPA with its (T, T) mask (toy only: it takes too long on long rows)
  packed_full    one row, SDPA per segment, logits of every token
  packed         one row, SDPA per segment, loss on trained tokens alone: data.packing=true
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmga.machine import machine_in_words

RESULT = Path(__file__).parent / "results" / "packing.json"
ROOT = Path(__file__).parents[1]
TOY_MODEL = ROOT / "llmga" / "toyworld" / "checkpoints" / "base" / "mllm"
WAYS = {"mix665k": ("padded", "padded_chunked", "packed_full", "packed"), "head": ("full", "chunked")}
WAYS["toy"] = ("padded", "padded_chunked", "packed_dense", "packed_full", "packed")

# Part: thousand examples (LLaVA-1.5's paper), and assumed: median tokens of text, spread, share trained, has a picture.
MIX665K = {
    "LLaVA": (158, 260, 0.5, 0.70, True),
    "ShareGPT": (40, 1100, 0.7, 0.75, False),
    "VQAv2": (83, 140, 0.5, 0.15, True),
    "GQA": (72, 230, 0.5, 0.15, True),
    "OKVQA": (9, 90, 0.2, 0.05, True),
    "OCRVQA": (80, 170, 0.3, 0.25, True),
    "A-OKVQA": (66, 120, 0.3, 0.05, True),
    "TextCaps": (22, 90, 0.2, 0.20, True),
    "RefCOCO": (48, 260, 0.6, 0.40, True),
    "VG": (86, 430, 0.6, 0.45, True),
}
PICTURE_TOKENS, MAX_LENGTH = 576, 2048
IMAGE_TOKEN_ID, VOCABULARY = 3, 512


class Division(NamedTuple):
    """How a step's examples are divided into forward passes."""

    batch_size: int = 0
    passes: int = 0
    devices: int = 1


SETTINGS = (
    ("toy, 16 a pass", Division(16, 12)),  # as `make stage1`
    ("toy, 32 a pass", Division(32, 6)),
    ("mix665k, 16 a pass", Division(16, 1, 8)),  # LLaVA-1.5
    ("mix665k, 4 a pass", Division(4, 4, 8)),  # LLMGA
    ("head", Division()),
)
Example = dict[str, Any]


def mix665k_examples(seed: int = 0) -> Iterator[Example]:
    """Random tokens with the lengths, pictures and trained shares of MIX665K."""
    rng = np.random.default_rng(seed)
    parts = list(MIX665K.values())
    counts = np.array([part[0] for part in parts])
    picture = np.zeros((3, 336, 336), np.float32)
    index = 0
    while True:
        _, median, spread, trained, has_picture = parts[rng.choice(len(parts), p=counts / counts.sum())]
        room = MAX_LENGTH - PICTURE_TOKENS * has_picture
        text = int(np.clip(rng.lognormal(np.log(median), spread), 24, room))
        answer = max(1, int(text * trained))
        ids = rng.integers(10, VOCABULARY, text).tolist()
        input_ids = [1, *[IMAGE_TOKEN_ID] * (PICTURE_TOKENS * has_picture), *ids][: text + PICTURE_TOKENS * has_picture]
        labels = [-100] * (len(input_ids) - answer) + input_ids[len(input_ids) - answer :]
        pixels = picture if has_picture else None
        yield {"input_ids": input_ids, "labels": labels, "pixel_values": pixels, "sample_id": index, "held_out": False}
        index += 1


def mix665k_model() -> Any:
    """A LLaVA with 576 tokens a picture; random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **tower),
        text_config=LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=MAX_LENGTH, **llm),
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=PICTURE_TOKENS,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def mix665k() -> tuple[Any, Iterator[Example], Any]:
    """Model, examples and the padding collator of the mixture."""
    from llmga.stage1.data import Collator

    return mix665k_model(), mix665k_examples(), Collator(0, IMAGE_TOKEN_ID, PICTURE_TOKENS, (3, 336, 336))


def toy(data_dir: Path) -> tuple[Any, Iterator[Example], Any]:
    """Model, examples and the padding collator of `make stage1`."""
    from llmga.config import load_config
    from llmga.stage1.added_tokens import add_generation_tags
    from llmga.stage1.config import Stage1Config
    from llmga.stage1.data import Collator, build_datasets
    from llmga.stage1.model import load_mllm

    overrides = [f"data.sources=[{{path: {data_dir / 'train.jsonl'}}}]", "data.validation=[]", "run.eval_every_steps=0"]
    overrides += [f"model.path={TOY_MODEL}", "run.sample_every_steps=0"]
    cfg = load_config(Stage1Config, ROOT / "configs" / "stage1" / "toy.yaml", overrides)
    mllm = load_mllm(cfg.model.path)
    add_generation_tags(mllm, mllm.tags)
    dataset = build_datasets(cfg, mllm.processor, 4096)[0]
    return mllm.model, (dataset[index] for index in range(len(dataset))), Collator.of(dataset)


def measure(mixture: str, way: str, division: Division, data_dir: Path) -> dict[str, float]:
    """Train one step, after a forward and backward pass to warm up."""
    import torch

    from llmga.stage1.balance import balanced_order
    from llmga.stage1.cross_entropy import use_chunked_cross_entropy
    from llmga.stage1.model import set_trainable
    from llmga.stage1.packed_attention import use_packed_sdpa
    from llmga.stage1.packing import PackingCollator
    from llmga.tokens import IGNORE_INDEX

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if mixture == "head":
        return measure_head(way)
    model, source, collator = mix665k() if mixture == "mix665k" else toy(data_dir)
    set_trainable(model.train(), "projector+llm")
    if way in ("packed", "packed_full"):
        use_packed_sdpa(model.model.language_model)
    if way in ("packed", "padded_chunked"):
        use_chunked_cross_entropy(model)
    collate = PackingCollator(collator) if way.startswith("packed") else collator
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    examples = list(islice(source, division.batch_size * division.passes * division.devices))
    lengths = np.array([len(example["input_ids"]) for example in examples])
    trained = sum(label != IGNORE_INDEX for example in examples for label in example["labels"][1:])
    order = balanced_order(lengths, division.batch_size) if way.startswith("packed") else np.arange(len(examples))
    batches = order.reshape(-1, division.batch_size)

    def one_pass(batch: np.ndarray) -> tuple[float, int]:
        """The batch's part of the loss, its gradients added; and the tokens that were computed."""
        tensors = collate([examples[index] for index in batch])
        if way == "packed_dense":
            tensors = {name: value for name, value in tensors.items() if "seq_lens" not in name and "max_" not in name}
        loss = model(**tensors, use_cache=False, num_items_in_batch=torch.tensor(trained)).loss
        loss.backward()
        return float(loss.detach()), tensors["input_ids"].numel()

    before_mb = peak_mb()
    one_pass(batches[0])
    optimizer.zero_grad()
    loss, computed, seconds = 0.0, 0, []
    for batch in batches:
        start = time.process_time()
        part, tokens = one_pass(batch)
        seconds.append(time.process_time() - start)
        loss, computed = loss + part, computed + tokens
    start = time.process_time()
    optimizer.step()
    step_s = time.process_time() - start
    slowest = np.array(seconds).reshape(division.passes, division.devices).max(axis=1)
    useful = int(lengths.sum())
    return {
        "useful_tokens_per_s": round(useful / (sum(seconds) + step_s), 1),
        "useful_tokens_per_s_together": round(useful / (slowest.sum() + step_s), 1),
        "computed_per_useful_token": round(computed / useful, 4),
        "seconds_per_pass": round(float(np.mean(seconds)), 3),
        "memory_of_a_step_mb": round(peak_mb() - before_mb),
        "loss": round(loss, 5),
    }


def measure_head(way: str, tokens: int = 2048, width: int = 512, vocabulary: int = 128_256) -> dict[str, float]:
    """The loss and its gradients, forward and backward."""
    import torch
    from torch.nn import functional

    from llmga.stage1.cross_entropy import summed_cross_entropy

    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * 0.05).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    trained = torch.rand(tokens) < 0.3
    before_mb, start = peak_mb(), time.process_time()
    if way == "full":
        logits = functional.linear(hidden, weight).float()
        total = functional.cross_entropy(logits, targets.where(trained, -100), reduction="sum")
    else:
        total = summed_cross_entropy(hidden[trained], weight, targets[trained])
    total.backward()
    seconds = time.process_time() - start
    norm = float(torch.nn.utils.get_total_norm([hidden.grad, weight.grad]))
    return {
        "useful_tokens_per_s": round(tokens / seconds, 1),
        "memory_of_a_step_mb": round(peak_mb() - before_mb),
        "loss": round(float(total.detach()) / int(trained.sum()), 5),
        "gradient_norm": round(norm, 4),
    }


def peak_mb() -> float:
    """Most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(mixture: str, division: Division, rounds: int, data_dir: Path) -> dict[str, Any]:
    """Every way in turn, `rounds` times, the faster round of each."""
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for way in WAYS[mixture]:
            command = [sys.executable, __file__, "--measure", mixture, way, "--data", str(data_dir)]
            command += ["--division", *map(str, division)]
            variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=variables)
            if done.returncode:
                raise SystemExit(f"measuring {mixture} {way} failed with exit code {done.returncode}")
            result = json.loads(done.stdout.splitlines()[-1])
            if way not in found or result["useful_tokens_per_s"] > found[way]["useful_tokens_per_s"]:
                found[way] = result
    slow, *_, fast = (found[way] for way in WAYS[mixture])
    summary: dict[str, Any] = {"ways": found}
    if mixture != "head":
        summary = {**division._asdict(), "ways": found}
        summary["tokens_ratio"] = round(slow["computed_per_useful_token"] / fast["computed_per_useful_token"], 3)
    summary["times_faster"] = round(fast["useful_tokens_per_s"] / slow["useful_tokens_per_s"], 2)
    if division.devices > 1:
        together = "useful_tokens_per_s_together"
        summary["times_faster_together"] = round(fast[together] / slow[together], 2)
    summary["memory_times_smaller"] = round(slow["memory_of_a_step_mb"] / fast["memory_of_a_step_mb"], 2)
    print(mixture, json.dumps(summary, indent=1), flush=True)
    return summary


def main() -> None:
    """Measure one way, or compare all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="the fastest one counts")
    parser.add_argument("--only", default="", help="settings whose name holds this; the others stay as they are")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--data", type=Path, help="toy data, if already built")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--division", nargs=3, type=int, default=(0, 0, 1), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, Division(*args.division), args.data)))
        return
    chosen = [(name, division) for name, division in SETTINGS if args.only in name]
    if not chosen:
        parser.error(f"--only {args.only!r} is in none of {[name for name, _ in SETTINGS]}")
    result = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        data_dir = args.data or Path(work) / "toy"
        if args.data is None and any(name.startswith("toy") for name, _ in chosen):
            build = [sys.executable, ROOT / "data_tools" / "build_world.py", "--out", data_dir, "--rows", "4000"]
            subprocess.run([*build, "--no-sheet"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        for name, division in chosen:
            result[name] = compare(name.partition(",")[0], division, args.rounds, data_dir)
    result = {
        "command": f"python benchmarks/packing.py --rounds {args.rounds}",
        "machine": machine_in_words("torch", "transformers", threads=1, note="float32, processor time is counted"),
        **{name: result[name] for name, _ in SETTINGS if name in result},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}; {result['machine']}")


if __name__ == "__main__":
    main()
