"""The sizes in a checkpoint's config.json, checked before any module is made with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thesislib.errors import BadInput, shown

# the largest accepted, far above any model that runs here
MAX_SIZES = {
    "num_hidden_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 27,
}
MAX_PARAMETERS = 1 << 40
MAX_BYTES = 1 << 22  # of a config.json
# with these the parameters can be counted
COUNTED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
BY_BLOCK = ("layer_types", "no_rope_layers")  # lists with an entry for each block


def read_sizes(folder: Path) -> None:
    """Check the config.json of a checkpoint folder.

    Raises:
        BadInput: a file that cannot be read, or a size that `check_sizes` refuses.
    """
    file = folder / "config.json"
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        config = json.loads(file.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read ({error}): expected a checkpoint's configuration") from error
    check_sizes(config, str(file))


def check_sizes(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Check that the sizes of a configuration are whole numbers in range, and that heads divide as they must.

    A size that is not given is not checked: transformers has a default for it.

    Args:
        config: the object in a config.json.
        where: its file, for messages.

    Raises:
        BadInput: the first size that is wrong, by name.
    """
    if not isinstance(config, Mapping):
        raise BadInput(f"{where} is a {type(config).__name__}: expected an object with a model's sizes")
    sizes = {name: config[name] for name in MAX_SIZES if config.get(name) is not None}
    for name, size in sizes.items():
        most = MAX_SIZES[name]
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise BadInput(f"{where}: '{name}' is {shown(size)}: expected a whole number from 1 to {most:,}")
    heads, groups, width = (sizes.get(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and groups and heads % groups:
        raise BadInput(
            f"{where}: 'num_key_value_heads' is {groups}: expected a divisor of the {heads} heads in "
            "'num_attention_heads'"
        )
    if heads and width and "head_dim" not in sizes and width % heads:
        raise BadInput(
            f"{where}: 'num_attention_heads' is {heads}: expected a divisor of 'hidden_size', {width}, or a 'head_dim'"
        )
    head = sizes.get("head_dim") or (width and heads and width // heads)
    if head and head % 2:
        raise BadInput(
            f"{where}: a head has {head} dimensions: expected an even number, since rotary positions turn pairs"
        )
    if all(name in sizes for name in COUNTED):
        depth, inner = sizes["num_hidden_layers"], sizes["intermediate_size"]
        count = 2 * width * sizes["vocab_size"] + depth * width * (3 * inner + 2 * head * (heads + (groups or heads)))
        if count > MAX_PARAMETERS:
            raise BadInput(f"{where}: these sizes make {count:.2g} parameters: expected at most {MAX_PARAMETERS:.2g}")
    for name in BY_BLOCK:
        entries = config.get(name)
        if entries is not None and not (isinstance(entries, list) and len(entries) <= MAX_SIZES["num_hidden_layers"]):
            raise BadInput(f"{where}: '{name}' is {shown(entries)}: expected a list with an entry a block")
