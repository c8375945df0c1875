"""The command line. Each command parses and calls one function; a MezoError becomes one line and exit code 2."""

import sys
import time
import warnings
from typing import Any

from mezo_scale.cli import (  # noqa: F401  registers them
    bench,
    compare,
    evaluate,
    export,
    generate,
    init,
    merge,
    plan,
    push,
    recipe,
    replay,
    runs,
    status,
    submit,
    tasks,
    train,
    verify,
)
from mezo_scale.cli.app import app
from mezo_scale.cli.arguments import is_first_rank
from mezo_scale.errors import MezoError, SharedError

__all__ = ["app", "main"]

_GRACE_S = 30  # for rank 0 to say what all ranks have met


def main() -> None:
    """Entry point. Exit codes: 0, 2 for what the user can mend, 130 for an interrupt; a bug keeps its traceback."""
    warnings.formatwarning = _one_line  # type: ignore[assignment]  # it takes the place, and leaves it out
    try:
        try:
            app()
        except MezoError as error:
            if not is_first_rank() and _is_shared(error):
                # The launcher ends all ranks with the first that leaves, so rank 0 leaves first. If nobody ends this
                # one, rank 0 is lost, or has not met the error: better said twice than never.
                time.sleep(_GRACE_S)
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_shared(error: MezoError) -> bool:
    """Whether rank 0 has the same error to print: a recipe is the same for all, and the world says so of the rest."""
    return "mezo_scale.distributed.world" not in sys.modules or isinstance(error, SharedError)


def _one_line(message: Warning | str, *where: Any, line: str | None = None) -> str:
    """A warning as the command line prints it: without the place in the code."""
    return f"warning: {message}\n"
