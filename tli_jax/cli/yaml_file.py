"""YAML files: the only module that reads and writes them."""

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from tli_jax.errors import MissingInputError, UsageError

_LARGEST_FILE = 2**17  # bytes of YAML, which takes seconds to read


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingInputError(f"{path}: no such configuration file")
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise ValueError(f"is larger than {_LARGEST_FILE:,} bytes")
        content = yaml.load(data.decode("utf-8-sig"), _Loader)  # a safe loader
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        raise UsageError(f"{path}: is not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold keys and values, is {type(content).__name__}")
    return content


def to_yaml(config: Any) -> str:
    """A configuration as the YAML that ``parse`` reads, every key in it."""
    values = plain(dataclasses.asdict(config))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes strings with characters that do not print. Otherwise PyYAML turns U+0085 and U+2028 into line breaks."""

    def represent_str(self, data: str) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def plain(value: Any) -> Any:
    """Convert tuples to lists, as YAML and JSON return them."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


class _Loader(yaml.SafeLoader):
    """YAML with what a configuration needs: text, numbers, yes and no, null, lists and mappings.

    No aliases, which make a kilobyte into gigabytes; no key twice, where one would win silently; and no numbers but
    decimal ones: 0123, 1:30 and 2024-01-01 stay text.
    """

    yaml_implicit_resolvers: ClassVar = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    yaml_constructors: ClassVar = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"alias *{event.anchor}: write it out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        if not is_unicode(text):
            raise yaml.MarkedYAMLError(problem="half a surrogate pair", problem_mark=node.start_mark)
        return text

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found: dict[Any, Any] = {}
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="must be keys and values", problem_mark=node.start_mark)
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | None):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            if key in found:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=deep)
        return found


# A scalar that is a number or a date here must also be one to PyYAML, which writes configurations.
for _tag, _form, _starts in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"0|-?[1-9][0-9]*", "-0123456789"),
    (
        "float",
        r"(?:[-+]?[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})$"), list(_starts))


def is_unicode(text: str) -> bool:
    """Whether it can be written anywhere. The system gives bytes of arguments that are not UTF-8 as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
