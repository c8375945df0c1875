"""YAML as far as a recipe needs it: mappings, lists, text, numbers, true, false and null, each written once.

What else YAML has is refused: aliases and merge keys can grow without bound, tags make other types, and of two equal
keys one would be lost. What looks like a date is text.
"""

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

MOST_BYTES = 1_000_000
MOST_LEVELS = 20
MOST_VALUES = 10_000
_DIGITS = 100  # of an integer, at most
_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


def read(source: str | bytes) -> Any:
    """The value that a YAML document holds; None if it is empty.

    Raises:
        yaml.YAMLError, ValueError: it is larger than MOST_BYTES, deeper than MOST_LEVELS, of more than MOST_VALUES, or
            not of the kind above.
    """
    if len(source) > MOST_BYTES:
        raise ValueError(f"it has {len(source):,} bytes, expected at most {MOST_BYTES:,}")
    text = source.decode("utf-8-sig") if isinstance(source, bytes) else source
    return _Loader(text).get_single_data()


class _Loader(yaml.SafeLoader):
    """SafeLoader without the parts of YAML that a recipe has no use for."""

    yaml_implicit_resolvers = {  # noqa: RUF012  as the base class has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _level = _values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise ComposerError(None, None, "an alias (*name): write the value out instead", mark)
        self._level += 1
        self._values += 1
        if self._values > MOST_VALUES:
            raise ComposerError(None, None, f"more than {MOST_VALUES:,} values", mark)
        if self._level > MOST_LEVELS:
            raise ComposerError(None, None, f"more than {MOST_LEVELS} levels inside each other", mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _PLAIN:
            tag = node.tag.replace(_TAG, "!!")
            raise ConstructorError(None, None, f"a value tagged {tag[:40]}: write it plainly", node.start_mark)
        if node.tag == f"{_TAG}int" and len(node.value) > _DIGITS:
            raise ConstructorError(None, None, f"an integer of more than {_DIGITS} digits", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.removeprefix(_TAG)
            raise ConstructorError(None, None, f"no {kind} that can be read ({error})", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                raise ConstructorError(None, None, "a key that is a merge, a list or a tree", key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value[:40]} twice: keep one", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
