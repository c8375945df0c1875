"""What a model writes after a prompt: a model as it is, or a run's after its steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mezo_scale import recipe as recipes
from mezo_scale.distributed.world import World
from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.models import checkpoints
from mezo_scale.optim.replay import replay
from mezo_scale.runs.beginning import begun
from mezo_scale.runs.console import Screen
from mezo_scale.runs.directory import RunDirectory
from mezo_scale.tasks.encoding import open_tokens


def generate(
    source: str, prompts: Sequence[str], max_new_tokens: int, temperature: float, seed: int, until: int | None
) -> list[str]:
    """The text that follows each prompt, without it. In one process, on a GPU if there is one.

    Args:
        source: the directory of a run, or a model: a folder or a name on the hub.
        max_new_tokens: tokens at most; the end of the text ends it before.
        temperature: 0 takes the likeliest token every time; else they are drawn, as `seed` says.
        until: steps of the run to take; None: all of them.

    Raises:
        RecipeError, ModelError, TrajectoryError: no such model or run, or one that can't write.
    """
    world = World.from_environment()
    if world.size > 1:
        raise RecipeError(f"generate runs in one process, but WORLD_SIZE is {world.size}: start it without a launcher")
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if empty:
        raise RecipeError(f"prompt {empty[0]} is empty: expected text")
    model, tokenizer = _load(source, until, Screen(world))
    if not model.can_generate():
        raise ModelError(f"{source} is a {type(model).__name__}, which can't write text: give a causal language model")
    model = model.eval().to(world.device)
    torch.manual_seed(seed)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature else None,  # transformers keeps the 50 likeliest where nobody says
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    written = []
    for prompt in prompts:
        ids = torch.tensor([open_tokens(tokenizer, prompt)[0]], device=world.device)
        (tokens,) = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        written.append(tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True))
    return written


def _load(source: str, until: int | None, screen: Screen) -> tuple[Any, Any]:
    """A run's weights come from its base and its log: they are there at every step, a checkpoint at the end only."""
    run = RunDirectory(Path(source))
    if not run.trajectory.is_file():
        if until is not None:
            raise RecipeError(f"--until is {until}, but {source} is not the directory of a run")
        checkpoints.find(source)
        return checkpoints.read(source, torch.float32), checkpoints.load_processor(source)
    base, records = recipes.load(source).model.name, run.read_log()
    checkpoints.find(base)
    model = begun(base, records, run.adapter_init if run.adapter_init.is_dir() else None)
    with screen.counting("replaying") as progress:
        replay(model, records, until, progress=progress)
    return model, checkpoints.load_processor(base)
