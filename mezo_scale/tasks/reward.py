"""A reward of one's own: a Python function that scores the texts which a model chooses or writes."""

import hashlib
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mezo_scale.errors import RecipeError

Asked = tuple[str, tuple[str, ...]]
"""A row's prompt, and all texts that are right after it."""


def is_reward(objective: str) -> bool:
    """Whether the name of an objective is that of a function: module:function."""
    return ":" in objective


@dataclass(frozen=True)
class Reward:
    """A function of rows, each a dict with prompt, text and gold (a list), to as many scores: higher is better.

    Attributes:
        name: module:function.
        function: what it names.
        file: its module's, which errors are told by.
        digest: 64 bits in hexadecimal of the file: a run does not go on with another.
    """

    name: str
    function: Callable[[list[dict[str, Any]]], Any]
    file: str
    digest: str

    @classmethod
    def load(cls, name: str) -> "Reward":
        """Imports the module, from the current directory before others.

        Raises:
            RecipeError: there is no such module or function, or the module can't be imported.
        """
        where, _, what = name.partition(":")
        if not all(part.isidentifier() for part in where.split(".")) or not what.isidentifier():
            raise RecipeError(f"train.objective: found {name!r}, expected module:function, as in rewards:brevity")
        module = _import(where, name)
        function, file = getattr(module, what, None), inspect.getsourcefile(module)
        if not callable(function) or file is None:
            raise RecipeError(
                f"train.objective: there is no function {what!r} in {module.__name__} ({file}), which has "
                f"{', '.join(_functions(module)) or 'none'}: name it as module:function"
            )
        return cls(name, function, file, hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16])

    def of(self, texts: Sequence[str | None], asked: Sequence[Asked]) -> list[float]:
        """The score of each row's text; NaN where there is no text.

        Raises:
            RecipeError: in one line, the function raised, or did not give one finite number for each row.
        """
        rows = [
            {"prompt": prompt, "text": text, "gold": list(gold)}
            for text, (prompt, gold) in zip(texts, asked, strict=True)
            if text is not None
        ]
        scores = iter(self._scores(rows) if rows else ())
        return [math.nan if text is None else next(scores) for text in texts]

    def _scores(self, rows: list[dict[str, Any]]) -> list[float]:
        try:
            found = self.function([dict(row) for row in rows])  # a copy: what it changes is its own
        except Exception as error:
            raise RecipeError(f"train.objective: {self.name} raised {_told(error, self.file)}") from None
        try:
            scores = [float(score) for score in found]
        except (TypeError, ValueError):
            raise RecipeError(
                f"train.objective: {self.name} returned {found!r:.80}, expected a list of {len(rows)} numbers"
            ) from None
        if len(scores) != len(rows):
            raise RecipeError(
                f"train.objective: {self.name} returned {len(scores)} scores for {len(rows)} rows: expected one each"
            )
        bad = [number for number, score in enumerate(scores) if not math.isfinite(score)]
        if bad:
            first, more = rows[bad[0]], f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise RecipeError(
                f"train.objective: {self.name} gave {scores[bad[0]]} for row {bad[0] + 1} of {len(rows)}{more}, text "
                f"{first['text']!r:.60} after {first['prompt'][-60:]!r}: expected a finite number"
            )
        return scores


def _import(module: str, name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; what the function imports later is found, too
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise RecipeError(f"train.objective: {name} can't be imported: it needs {error.name!r}") from None
        raise RecipeError(
            f"train.objective: there is no module {error.name!r} for {name}, expected a Python file in {here} or an "
            "installed package"
        ) from None
    except Exception as error:  # a user's module raises anything
        raise RecipeError(f"train.objective: {name} can't be imported: {_told(error, module)}") from None


def _functions(module: ModuleType) -> list[str]:
    return [
        name
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    ]


def _told(error: BaseException, file: str) -> str:
    """What an error says, and the line of the user's own file that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    else:
        last = (own or frames)[-1]
        where = f"{last.filename}:{last.lineno}"
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{': ' if said else ''}{said} ({where})"
