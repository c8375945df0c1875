"""The reference page of the recipe, made from the descriptions of its fields."""

from mezo_scale.recipe.tree import options, section_of


def reference() -> str:
    """The reference page of the recipe, in Markdown."""
    lines = [
        "# The recipe",
        "",
        "Made by `mezo-scale recipe` from the descriptions in `mezo_scale/recipe/`; a test keeps it so.",
        "",
        "A recipe is a YAML file of sections. `mezo-scale train RECIPE.yaml section.field=value ...` overrides single",
        "fields; a field's bare name will do where it is the only one of that name (`steps=200`). Unknown keys and",
        "wrong types are refused. The recipe of a run, every field written out, is kept in the run directory.",
    ]
    section = None
    for option in options():
        if section != option.key.split(".")[0]:
            section = option.key.split(".")[0]
            about = section_of(section).__doc__ or ""
            lines += ["", f"## {section}", "", about, "", "| field | type | default | |", "|---|---|---|---|"]
        kind = option.type.replace("|", "\\|")
        lines.append(f"| `{option.key}` | {kind} | `{option.default}` | {option.description} |")
    return "\n".join(lines) + "\n"
