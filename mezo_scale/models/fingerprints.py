"""Digests of what a result rests on: a model's files, configuration, tokenizer or image processor; its examples."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mezo_scale.models.vision import ImageReader

_NO_MATTER = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype"}
"""Where a configuration lies, who wrote it, and what its weights were stored in."""


def of_config(config: Any) -> str:
    """64 bits in hexadecimal of all values of a transformers configuration that can decide the forward pass."""
    return _digest(_decisive(json.loads(config.to_json_string(use_diff=False))))


def of_processor(processor: Any) -> dict[str, str]:
    """The digest of a tokenizer or of an image processor, by what it is."""
    if isinstance(processor, ImageReader):
        return {"image processor": _digest(processor.rules())}
    return {"tokenizer": of_tokenizer(processor)}


def of_tokenizer(tokenizer: Any) -> str:
    """64 bits in hexadecimal of a tokenizer: vocabulary, merges and rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        rules: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), added]
    else:
        rules = json.loads(backend.to_str())
        for name in ("padding", "truncation"):  # each call sets them
            rules.pop(name, None)
    return _digest([rules, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)])


def of_examples(splits: object) -> str:
    """64 bits in hexadecimal of the examples of a task's splits, before a model's tokenizer has seen them."""
    return hashlib.sha256(repr(splits).encode()).hexdigest()[:16]


def of_files(paths: Iterable[Path]) -> str:
    """64 bits in hexadecimal of files, in order: of their sizes and all their bytes, or of a file above 256 MiB, whose
    digest would take as long as to load it, of 256 blocks of 1 MiB that lie evenly in it."""
    digest, block = hashlib.sha256(), 1 << 20
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in range(min(256, -(-size // block))):
                file.seek(place * block if size <= 256 * block else place * (size - block) // 255)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


def _decisive(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _decisive(inner) for name, inner in value.items() if name not in _NO_MATTER}
    return [_decisive(inner) for inner in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
