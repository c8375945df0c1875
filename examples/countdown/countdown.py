"""Countdown: reach a target by arithmetic on given numbers. A reward of what a model writes, and rows to learn from.

python countdown.py rows.jsonl 2000
mezo-scale train recipe.yaml
"""

import ast
import json
import operator
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

FORMAT = 0.1  # for an expression that is none of the right ones: something to climb by
_ASKED = re.compile(r"Numbers: ([\d, ]+)\. Target: (\d+)\.")
_ARITHMETIC = re.compile(r"[\d\s()+*/-]{1,80}")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def reward(rows: list[dict[str, Any]]) -> list[float]:
    """1 for an expression of the given numbers, each at most once, that reaches the target; FORMAT for any other; 0."""
    return [score(row["prompt"], row["text"]) for row in rows]


def score(prompt: str, text: str) -> float:
    """The reward of one text after a prompt; the last numbers and target of the prompt are meant."""
    numbers, target = _ASKED.findall(prompt)[-1]
    try:
        value, used = evaluate(text.partition("=")[0])
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return 0.0
    given = Counter(int(number) for number in numbers.split(","))
    return 1.0 if value == int(target) and Counter(used) <= given else FORMAT


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an arithmetic expression, and the numbers in it.

    Raises:
        SyntaxError, ValueError: it is none.
        ZeroDivisionError: it divides by zero.
    """
    if not _ARITHMETIC.fullmatch(text):
        raise ValueError("no arithmetic")
    used: list[int] = []

    def value_of(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                used.append(number)
                return Fraction(number)
            case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
                found: Fraction = _OPERATIONS[type(operation)](value_of(left), value_of(right))
                return found
        raise ValueError("no arithmetic")

    return value_of(ast.parse(text.strip(), mode="eval").body), used


def rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Different tasks with one of their solutions each, a pure function of the arguments."""
    draw, seen = random.Random(seed), set()
    while len(seen) < count:
        numbers = draw.sample(range(1, 21), 3)
        first, second = draw.choices("+-*", k=2)
        solution = f"{numbers[0]} {first} {numbers[1]} {second} {numbers[2]}"
        target, _ = evaluate(solution)
        asked = (", ".join(map(str, sorted(numbers))), int(target))
        if 0 < target < 100 and asked not in seen:
            seen.add(asked)
            yield {"numbers": asked[0], "target": asked[1], "solution": solution}


if __name__ == "__main__":
    path, number = Path(sys.argv[1]), int(sys.argv[2])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(number)))
