"""The real model on real texts: SmolLM2-135M on sentences of rotten_tomatoes, and the demo on 2 ranks by the CLI."""

import copy
import csv
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import mezo_scale as ms

ROOT = pathlib.Path(__file__).parents[2]
ANSWERS = [13321, 1109]  # " terrible", " great"


@pytest.fixture(scope="module")
def model(demo: pathlib.Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32).eval()


def sentences(demo: pathlib.Path, rows: int) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model", padding_side="left")
    with (demo / "rotten_tomatoes.csv").open(newline="", encoding="utf-8") as file:
        examples = [row for row, _ in zip(csv.DictReader(file), range(rows), strict=False)]
    tokens = tokenizer([f"{example['text']} It was" for example in examples], padding=True, return_tensors="pt")
    return {**tokens, "labels": torch.tensor([int(example["label"]) for example in examples])}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=1
    ).logits[:, -1]
    return F.cross_entropy(logits[:, ANSWERS], batch["labels"], reduction="none")


def test_the_weights_are_trained_ones(model: nn.Module, demo: pathlib.Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith(" Paris")


def test_branches_and_the_write_are_exact_on_the_real_model(model: nn.Module, demo: pathlib.Path) -> None:
    batch, eps = sentences(demo, 4), 1e-3
    tuned = copy.deepcopy(model)
    opt = ms.MeZO(tuned, lr=1e-6, eps=eps)
    opt.step(batch=batch, objective=loss)
    record = opt.last_record
    (seed,), means = record.seeds, []
    for scale in (eps, -eps):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, param in moved.named_parameters():
                z = ms.noise.normal(seed, ms.noise.param_id(name), 0, param.numel())
                param.view(-1).add_(torch.tensor(scale) * z)
            means.append(float(loss(moved, batch).double().mean()))
        del moved
    assert opt.paired is True
    assert record.loss == pytest.approx(sum(means) / 2, rel=1e-5)
    assert record.projected_grads[0] == pytest.approx((means[0] - means[1]) / (2 * eps), rel=1e-2)
    before = dict(model.named_parameters())
    for name, param in tuned.named_parameters():
        z = ms.noise.normal(seed, ms.noise.param_id(name), 0, param.numel()).view_as(param)
        assert torch.equal(param, before[name] + torch.tensor(record.alphas[0]) * z), name


MEMORY = """
import pathlib, re, sys
import torch
from tests.real.test_smollm2 import loss, sentences
from transformers import AutoModelForCausalLM
import mezo_scale as ms
demo = pathlib.Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32).eval()
opt = ms.MeZO(model)
opt.step(batch=sentences(demo, 16), objective=loss)  # no later one takes more: the first also learns how rows divide
weights = sum(p.numel() * p.element_size() for p in model.parameters())
# Not ru_maxrss: a process inherits it from the one that started it.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024 - weights)
"""


def test_a_process_peaks_within_its_weights_and_a_gigabyte_or_so(demo: pathlib.Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", MEMORY, str(demo)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1.2e9  # everything that Python and torch load included


def test_the_demo_s_recipe_trains_under_torchrun_and_its_log_rebuilds_it(
    demo: pathlib.Path, tmp_path: pathlib.Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    small = ["train.steps=2", "train.batch_size=8", "task.train=64", "task.dev=4", "task.test=8"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = [*launch, "-m", "mezo_scale.cli", "train", "launch/demo.yaml", *small, f"output.dir={tmp_path / 'run'}"]
    done = subprocess.run(train, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert results["tuned"]["step"] == 2
    code, out, err = run("verify", tmp_path / "run")
    assert code == 0, out + err
