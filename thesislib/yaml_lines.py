"""YAML with line numbers for error messages, without YAML 1.1's surprising types, aliases and tags."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from thesislib.errors import BadInput, shown, unknown

LARGEST, DEEPEST = 1 << 20, 20  # bytes, levels: nobody writes more by hand
OPENING: tuple[type[yaml.Token], ...] = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
OPENING += (yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken)
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def compose(path: Path) -> yaml.Node:
    """The root node of the YAML document in a file.

    Raises:
        BadInput: no such file, not text, not YAML (the message has the line), empty, too large, nested too deeply, or
            with aliases.
    """
    if not is_file(path):
        raise BadInput(f"{path} is {'a folder' if path.is_dir() else 'not there'}: expected a .yaml file")
    try:
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{path} is larger than {LARGEST} bytes: expected a .yaml file written by hand")
        root = _node(path.read_text("utf-8-sig"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadInput(f"{path}{f':{mark.line + 1}' if mark else ''}: not YAML ({why})") from error
    if root is None:
        raise BadInput(f"{path} is empty")
    return root


def _node(text: str, where: str | Path) -> yaml.Node | None:
    """The root node of a YAML text, None for an empty one; BadInput if it is nested too deeply or has aliases."""
    depth = 0
    for token in yaml.scan(text, yaml.BaseLoader):  # lazy, so a hostile text is refused at its first bad token
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > DEEPEST:
            raise BadInput(f"{where}:{token.start_mark.line + 1}: nested more than {DEEPEST} deep")
        if isinstance(token, yaml.AliasToken):
            raise BadInput(
                f"{where}:{token.start_mark.line + 1}: aliases such as '*{token.value}' are not understood: "
                "write the value out"
            )
    return yaml.compose(text, yaml.BaseLoader)


def at(path: Path, node: yaml.Node, message: object) -> BadInput:
    """The error for a node: the file, the line and a message, with colons between."""
    return BadInput(f"{location(path, node)}: {message}")


def location(path: Path, node: yaml.Node) -> str:
    """Where a node stands: the file, a colon and the line, counted from 1."""
    return f"{path}:{node.start_mark.line + 1}"


def entries(
    node: yaml.MappingNode, path: Path, noun: str, options: Iterable[str] | None = None
) -> dict[str, yaml.Node]:
    """A mapping's value nodes by key.

    Args:
        node: the mapping.
        path: its file, for messages.
        noun: what a key is called in messages, e.g. "stage".
        options: the keys that are allowed; None for any.

    Raises:
        BadInput: a key that is no text, is not allowed or stands there twice.
    """
    children: dict[str, yaml.Node] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise at(path, key, f"a {noun} must be a plain text")
        if options is not None and key.value not in options:
            raise at(path, key, unknown(noun, key.value, options))
        if key.value in children:
            raise at(path, key, f"the {noun} '{key.value}' is there twice")
        children[key.value] = child
    return children


def value(node: yaml.Node, path: Path) -> Any:
    """The value of a node. Unquoted scalars are read as in YAML 1.2.

    So 1:8 is a text (YAML 1.1 reads the number 68) and 1e-4 is a number (YAML 1.1 reads a text).
    """
    if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        raise at(path, node, f"the tag '{node.tag}' is not understood: write the plain value")
    if isinstance(node, yaml.SequenceNode):
        return [value(child, path) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key: value(child, path) for key, child in entries(node, path, "key").items()}
    text = node.value
    if isinstance(node, yaml.ScalarNode) and node.style is not None:  # quoted
        return text
    if text in ("true", "false"):
        return text == "true"
    if text in ("null", "~", ""):
        return None
    if re.fullmatch(r"[-+]?\d{1,18}", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text, re.ASCII) and math.isfinite(float(text)):
        return float(text)
    return text


def value_of_text(text: str, name: str) -> Any:
    """The value of a text given on the command line, read as `value` reads a file's; messages call it `name`.

    Raises:
        BadInput: not YAML, too long, nested too deeply, or with aliases.
    """
    if len(text) > LARGEST:
        raise BadInput(f"{name} is a text of {len(text)} characters: expected at most {LARGEST}")
    try:
        node = _node(text, name)
    except (yaml.YAMLError, BadInput) as error:
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadInput(f"{name} {shown(text)} is not understood ({why})") from error
    return None if node is None else value(node, Path(name))


def is_file(path: Path) -> bool:
    """Whether `path` is a file; False if it cannot be a path at all."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
