"""The section of a recipe that says what a run is about: the task, and its data."""

from pydantic import Field

from mezo_scale.recipe.sections import Name, Real, Section


class TaskSection(Section):
    """The task and its data."""

    name: Name = Field(
        "sentiment", description="Which task reads the data and poses the question; `mezo-scale tasks` lists them."
    )
    data: Name = Field(
        description="A file in CSV, TSV, JSONL, JSON (an array of objects), Parquet or plain text, its type by its "
        "name; a folder with one such file each for train, validation and test; or the name of a dataset on the hub "
        "(all its splits)."
    )
    subset: Name | None = Field(
        None, description="Only the rows whose `source` column says this; for a dataset on the hub its configuration."
    )
    template: str | None = Field(
        None,
        description="The prompt, with the example's fields in braces, used exactly as written (white space included); "
        "null means the task's own. With {mask} in it, it is a cloze for a masked language model, like RoBERTa.",
    )
    candidates: tuple[str, ...] | None = Field(
        None,
        strict=False,
        min_length=2,
        description="The answers, one per label and in the order of the labels; null means the task's own. For tasks "
        "that choose among the same answers for every row.",
    )
    label_column: Name | None = Field(
        None,
        description="For choice and image: the column that says which candidate is right, or of which class an image "
        "is; null means label.",
    )
    labels: tuple[str | int, ...] | None = Field(
        None,
        strict=False,
        min_length=2,
        description="For choice and image: what that column holds, in the order of candidates, or of the model's "
        "classes; null means 0, 1, ... or their own texts.",
    )
    answer_column: Name | None = Field(
        None,
        description="For answer: the column with the text that is right, or the list of them; null means answer.",
    )
    text_column: Name | None = Field(
        None, description="For text: the column with the running text; null means text. A .txt file has none."
    )
    image_column: Name | None = Field(
        None,
        description="For image: the column with the image, a path or a struct of bytes and path; null means image.",
    )
    metric: Name | None = Field(
        None,
        description="What decides. Tasks that choose: accuracy (the default), macro_f1, balanced_accuracy; the last "
        "two need candidates. Tasks that write: f1 (the default), exact_match. Running text: perplexity, of which "
        "less is better. Images: as tasks that choose.",
    )
    calibrate: bool = Field(
        False,
        description="For tasks that choose: in evaluations a candidate's score is its log-probability after the prompt "
        "minus that after a neutral prompt, so that answers that are likely anyway have no lead. Steps are not changed "
        "by it.",
    )
    neutral_prompt: str | None = Field(
        None,
        description="For calibrate: the neutral prompt, used exactly as written; null means the row's prompt with its "
        "columns left empty.",
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of an answer at most, within max_length; null means 16. For answers that are written.",
    )
    temperature: Real = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="For answers that are written in a step, where train.objective grades them: 0 takes the likeliest "
        "token, above it they are sampled, in all branches with the same randomness. Evaluation takes the likeliest.",
    )
    train: int = Field(
        1000,
        ge=1,
        description="Examples to train on, of running text blocks of max_length tokens; at most, where the data is a "
        "folder of splits.",
    )
    dev: int = Field(500, ge=1, description="Examples to evaluate on during the run; likewise.")
    test: int = Field(1000, ge=1, description="Examples for the result; no decision is taken on them. Likewise.")
    k_per_class: int | None = Field(
        None,
        ge=1,
        description="Few-shot: this many examples of each class to train on, and as many others for dev, in the place "
        "of train and dev.",
    )
    split_seed: int = Field(0, ge=0, lt=2**63, description="Seed of the permutation that splits the examples.")
    max_length: int = Field(
        256,
        ge=8,
        description="Longest sequence in tokens; the beginning of a longer prompt is cut off, of a cloze the end of "
        "its longest columns. A model with a table of positions must have as many.",
    )
