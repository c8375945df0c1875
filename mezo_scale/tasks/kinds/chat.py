"""Chats: the assistant's last turn, posed and ended as the tokenizer's chat template has it."""

from collections.abc import Sequence
from typing import Any

from mezo_scale.errors import ModelError
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.example import Dialogue, Question
from mezo_scale.tasks.kinds.generation import EncodedQuestion, Generation

_MARK = "0f1c9d4a7be2"  # stands for an answer, to find where the template puts it


class Chat(Generation):
    """The assistant's last turn, written greedily up to the end of the turn; graded as written answers are."""

    def __init__(self, tokenizer: Any, section: TaskSection) -> None:
        """Raises ModelError if the tokenizer has no chat template; RecipeError as `Generation` does."""
        super().__init__(tokenizer, section)
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "model.name: its tokenizer has no chat template, which task.name=chat is posed by: give an instruction "
                "model, or task.name=answer with a task.template"
            )
        _, self._end = self._around(Dialogue((("user", "Hello."),), ""))
        self._ending = dict.fromkeys((*self._special(self._end)[:1], tokenizer.eos_token_id), True)

    def encode(self, example: Dialogue) -> EncodedQuestion:  # type: ignore[override]
        """Tokenizes a dialogue; as of a question.

        Raises:
            ModelError: the template can't take these turns, or does not write the answer after its own prompt.
            RecipeError: there is no room for the answer.
        """
        prompt, end = self._around(example)
        if end != self._end:
            raise ModelError(
                f"model.name: its chat template ends turns with {self._end!r:.40} and with {end!r:.40}, expected one "
                "end: give another model"
            )
        return super().encode(Question(prompt, (example.answer,)))

    def posed(self, example: Dialogue) -> str:
        """The prompt as the model gets it."""
        return self._around(example)[0]

    def _around(self, example: Dialogue) -> tuple[str, str]:
        """What the template puts before the answer and after it."""
        turns = [{"role": role, "content": content} for role, content in example.turns]
        asked = self._render(turns, True)
        whole = self._render([*turns, {"role": "assistant", "content": _MARK}], False)
        before, mark, after = whole.partition(_MARK)
        # Some templates write more before an answer than they ask for one with: an empty thought, for one.
        if not mark or not before.startswith(asked):
            raise ModelError(
                f"model.name: its chat template asks for a turn with {asked[-40:]!r}, but does not write one after it: "
                "give a model whose template does"
            )
        after = after.rstrip()
        # What only looks like an end may be part of an answer, too.
        return before, after if self._special(after) else f"{after}{self._tokenizer.eos_token}"

    def _special(self, text: str) -> list[int]:
        """The tokens of a text that are special ones."""
        known = {*self._tokenizer.all_special_ids, *self._tokenizer.get_added_vocab().values()}
        return [token for token in self._tokenizer(text, add_special_tokens=False)["input_ids"] if token in known]

    def _render(self, turns: list[dict[str, str]], ask: bool) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # a template raises what it likes
            roles = ", ".join(turn["role"] for turn in turns)[:80]
            raise ModelError(
                f"model.name: its chat template can't take turns of {roles} ({' '.join(str(error).split())[:200]}): "
                "leave such rows out, or give another model"
            ) from None

    def _open(self, text: str) -> tuple[list[int], int]:
        # The template writes special tokens itself.
        tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return tokens, int(tokens[:1] == [self._tokenizer.bos_token_id])

    def _ends(self, token: int) -> bool:
        return token in self._ending

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()
