"""A checkpoint's config.json: sizes that no model has are refused before a module, or a list with an entry a block, is
made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thesislib.errors import BadInput, shown

# the largest that are taken, far above any model that runs here
SIZES = {
    "num_hidden_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 27,
}
NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
PARAMETERS = 1 << 40
LARGEST = 1 << 22  # bytes of a config.json
BY_BLOCK = ("layer_types", "no_rope_layers")


def read_sizes(folder: Path) -> None:
    """Raises BadInput for a config.json in `folder` that cannot be read, or see `check_sizes`."""
    file = folder / "config.json"
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST} bytes")
        plain = json.loads(file.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read ({error}): expected a checkpoint's configuration") from error
    check_sizes(plain, str(file))


def check_sizes(plain: Mapping[str, Any], where: str = "config.json") -> None:
    """Sizes of a configuration as JSON holds it: whole numbers, of a model that can be, that divide as they must.

    Sizes that it does not name are its kind's usual ones, which transformers knows.

    Raises:
        BadInput: the first one that is not, by name.
    """
    if not isinstance(plain, Mapping):
        raise BadInput(f"{where} is a {type(plain).__name__}: expected an object with a model's sizes")
    sizes = {}
    for name, most in SIZES.items():
        size = plain.get(name)
        if size is None:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise BadInput(f"{where}: '{name}' is {shown(size)}: expected a whole number from 1 to {most:,}")
        sizes[name] = size
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
    wide = sizes.get("head_dim") or (width and heads and width // heads)
    if wide and wide % 2:
        raise BadInput(
            f"{where}: a head has {wide} dimensions: expected an even number, since rotary positions turn pairs"
        )
    if all(name in sizes for name in NEEDED):
        depth, inner = sizes["num_hidden_layers"], sizes["intermediate_size"]
        count = 2 * width * sizes["vocab_size"] + depth * width * (3 * inner + 2 * wide * (heads + (groups or heads)))
        if count > PARAMETERS:
            raise BadInput(f"{where}: these sizes make {count:.2g} parameters: expected at most {PARAMETERS:.2g}")
    for name in BY_BLOCK:
        each = plain.get(name)
        if each is not None and not (isinstance(each, list) and len(each) <= SIZES["num_hidden_layers"]):
            raise BadInput(f"{where}: '{name}' is {shown(each)}: expected a list with an entry a block")
