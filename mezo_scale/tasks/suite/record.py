"""ReCoRD (Zhang et al., 2018; SuperGLUE): which entity was left out of a sentence. Several may be right.

A candidate is the whole sentence with an entity in its place: all its tokens are scored, those before the entity, too.
"""

from mezo_scale.errors import RecipeError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Example
from mezo_scale.tasks.posing import adapted, prompt_of, refuse_candidates
from mezo_scale.tasks.rows import text_of, texts_of
from mezo_scale.tasks.tables import Row, shown
from mezo_scale.tasks.task import CHOOSING, Task

TEMPLATE = "{passage}\n-"
PLACEHOLDER = "@placeholder"


def pose(section: TaskSection, row: Row) -> Example:
    """The highlights at the end of the passage become a list, which the sentence goes on with."""
    refuse_candidates(section)
    query = text_of(row, "query")
    if PLACEHOLDER not in query:
        raise RecipeError(f"task.data: {row.place} has the query {query!r:.60}, expected {PLACEHOLDER} in it")
    entities, answers = texts_of(row, "entities", "entity"), texts_of(row, "answers", "answer")
    unknown = [answer for answer in answers if answer not in entities]
    if unknown:
        raise RecipeError(
            f"task.data: {row.place} has the answer {unknown[0]!r:.60}, expected one of its entities "
            f"({shown(entities)}): leave the row out"
        )
    candidates = tuple(f" {query.replace(PLACEHOLDER, entity)}".rstrip(" ") for entity in entities)
    label, *also = (entities.index(answer) for answer in answers)
    row = adapted(row, {"passage": lambda passage: passage.replace("@highlight\n", "- ")})
    return Example(prompt_of(section, TEMPLATE, row), candidates, label, tuple(also))


TASK = Task.of_rows(
    pose,
    CHOOSING,
    "which entity of a news story a sentence about it leaves out",
    ("passage", "query", "entities", "answers"),
    objective="language_modeling",  # as the authors train it
)
