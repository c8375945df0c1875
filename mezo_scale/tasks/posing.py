"""How tasks that differ in their texts only are declared: a template, and what is right after it."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Cloze, Example, Question
from mezo_scale.tasks.rows import fill, fill_around_mask, has_mask, label_of, texts_of
from mezo_scale.tasks.tables import Row
from mezo_scale.tasks.task import CHOOSING, WRITING, Task

Changes = Mapping[str, Callable[[str], str]]
NO_OR_YES = ("false", "true")  # what else the labels 0 and 1 are called


def choice(
    about: str,
    template: str,
    candidates: Mapping[int, str],
    *,
    names: Sequence[str] = (),
    told_apart_by: Sequence[str] = (),
    changes: Changes | None = None,
    aliases: Mapping[str, str] | None = None,
    unlabelled: Sequence[object] = (),
    cloze: str = "",
    words: Mapping[int, str] | None = None,
    cloze_changes: Changes | None = None,
) -> Task:
    """A task that chooses among the same few answers for every row.

    Args:
        template: the prompt, with columns in braces.
        candidates: the answer for each label, in the order in which they are listed.
        names: what some copies of the data write in the place of the labels 0, 1, ..., in lower case.
        told_apart_by: columns, where there are such, in which rows of one prompt may differ and be different questions.
        changes: what is done to the text of a column before it is posed.
        aliases: what some copies of the data call a column.
        unlabelled: labels of rows that nobody could agree on: they are left out.
        cloze: the prompt for a masked language model, with columns and {mask} in braces; empty: the recipe's alone.
        words: the answers at the mask, likewise, where they are not `candidates`.
        cloze_changes: what is done to a column's text before it is posed as a cloze, where that is not `changes`.
    """

    def pose(section: TaskSection, row: Row) -> Example | None:
        is_cloze = has_mask(section.template)
        row = adapted(row, cloze_changes or changes if is_cloze else changes, aliases)
        if row.fields.get("label") in unlabelled:
            return None
        if section.candidates is not None:
            answers, label = own_candidates(section), label_of(row, len(section.candidates), names)
        else:
            own = words or candidates if is_cloze else candidates
            answers, label = tuple(own.values()), list(own).index(label_of(row, len(own), names))
        which = tuple(str(row.fields.get(name)) for name in told_apart_by)
        if is_cloze:
            return cloze_of(section, row, answers, label, which)
        return Example(prompt_of(section, template, row), answers, label, which=which)

    columns = (*_columns(template, aliases), _named("label", aliases))
    return Task.of_rows(pose, CHOOSING, about, columns, cloze=cloze)


def written(about: str, template: str, answers: tuple[str, str], *, changes: Changes | None = None) -> Task:
    """A task whose answer is written after the prompt.

    Args:
        template: the prompt, with columns in braces.
        answers: the column of a struct, and the field of it that lists the right answers.
        changes: what is done to the text of a column before it is posed.
    """

    column, field = answers

    def pose(section: TaskSection, row: Row) -> Question:
        prompt = prompt_of(section, template, adapted(row, changes))
        return Question(
            prompt, tuple(dict.fromkeys(f" {text.strip()}" for text in texts_of(row, column, "answer", field)))
        )

    return Task.of_rows(pose, WRITING, about, (*_columns(template), ".".join(answers)))


def cloze_of(
    section: TaskSection, row: Row, candidates: tuple[str, ...], label: int, which: tuple[str, ...] = ()
) -> Cloze:
    """The example of a recipe whose template has a mask. Raises RecipeError as `fill_around_mask` does."""
    assert section.template is not None, "has a mask"
    before, after = fill_around_mask(section.template, row)
    prompt = "{mask}".join("".join(text for text, _ in side) for side in (before, after))
    return Cloze(prompt, candidates, label, which=which, before=before, after=after)


def prompt_of(section: TaskSection, template: str, row: Row) -> str:
    """The recipe's template, exactly as written, or the task's own; MeZO's authors strip what stands before theirs."""
    return fill(template, row).lstrip() if section.template is None else fill(section.template, row)


def own_candidates(section: TaskSection) -> tuple[str, ...]:
    """The recipe's answers. Raises RecipeError if one is empty, or there twice."""
    found = section.candidates or ()
    if not all(text.strip() for text in found) or len(set(found)) < len(found):
        raise RecipeError(
            f"task.candidates: found {list(found)}, expected texts that differ, none of them empty: change those"
        )
    return found


def refuse_candidates(section: TaskSection) -> None:
    """Raises RecipeError if the recipe gives answers to a task that finds them in its rows."""
    if section.candidates is not None:
        raise RecipeError(
            f"task.candidates is given, but task.name is {section.name}, which finds them in each row: leave it out"
        )


def adapted(row: Row, changes: Changes | None = None, aliases: Mapping[str, str] | None = None) -> Row:
    """The row with its columns named and written as the task poses them. What is not there, or no text, stays so."""
    fields, blank = dict(row.fields), set(row.blank)
    for name, alias in (aliases or {}).items():
        if name not in fields and alias in fields:
            fields[name] = fields[alias]
            blank |= {name} if alias in blank else set()
    for name, change in (changes or {}).items():
        text = fields.get(name)
        if isinstance(text, str) and text.strip():
            fields[name] = change(text)
    return replace(row, fields=fields, blank=frozenset(blank))


def _columns(template: str, aliases: Mapping[str, str] | None = None) -> tuple[str, ...]:
    return tuple(_named(name, aliases) for _, name, _, _ in string.Formatter().parse(template) if name)


def _named(column: str, aliases: Mapping[str, str] | None) -> str:
    return f"{column} (or {aliases[column]})" if aliases and column in aliases else column
