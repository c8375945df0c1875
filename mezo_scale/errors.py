"""What can go wrong, as one tree. Every message says what was found, what was expected, and what to do.

MezoError
├── RecipeError        a recipe, an option or a path given by the user is wrong
├── ModelError         the model can't be tuned as it is (quantised, on meta, nothing trainable)
├── ShardingError      a layout that is not known, or that does not fit the processes
├── ViewError          the model can't be evaluated under a perturbed view as asked
├── TrajectoryError    a trajectory that is damaged, or belongs to another model or noise version
├── LaunchError        the processes of a run can't be started, or don't find each other
├── RankError          the ranks of one run disagree
└── SharedError        any of these, raised by every rank with the same text: one of them prints it
    └── NotFiniteError scores or losses that are not finite: nothing can be graded or learned from them

The command line prints a MezoError as one line and exits with 2; anything else is a bug and keeps its traceback.
Wrong arguments to a function are ValueErrors that name the argument, as everywhere in Python.
"""


class MezoError(Exception):
    """Root of all errors that a user can cause and mend."""


class RecipeError(MezoError):
    """A recipe, an option or a path given by the user is wrong."""


class ModelError(MezoError):
    """The model can't be tuned as it is."""


class ShardingError(MezoError):
    """A layout that is not known, or that does not fit the processes."""


class ViewError(MezoError):
    """The model can't be evaluated under a perturbed view as asked."""


class TrajectoryError(MezoError):
    """A trajectory that is damaged, or belongs to another model or noise version."""


class LaunchError(MezoError):
    """The processes of a run can't be started, or don't find each other."""


class RankError(MezoError):
    """The ranks of one run disagree."""


class SharedError(MezoError):
    """A MezoError that every rank raises with the same text: it is enough that one of them prints it."""


class NotFiniteError(SharedError):
    """Scores or losses that are not finite: nothing can be graded or learned from them. All ranks sum them up alike."""


def one_line(error: BaseException, characters: int = 300) -> str:
    """What somebody else's error says, for a message of ours; its type if it says nothing."""
    return " ".join(str(error).split())[:characters] or type(error).__name__
