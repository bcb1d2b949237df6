"""Tokenizers without an automatic end token, and checks that a model has a row for every token."""

import json
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thesislib.errors import BadInput, shown


def prepared(tokenizer: PreTrainedTokenizerBase, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer, changed so that it appends no token to a text; a token that it prepends (Llama's first) stays.

    An end token would end a prompt before the answer, and would make the context of a multiple-choice item one token
    longer than its part of the whole text. A missing padding token becomes the end token, if that has a row.

    Args:
        tokenizer: as transformers loaded it.
        rows: of the model's embedding.

    Raises:
        BadInput: a tokenizer that still appends a token, or whose model_max_length is no number.
    """
    if isinstance(longest := tokenizer.model_max_length, bool) or not isinstance(longest, (int, float)):
        raise BadInput(f"tokenizer_config.json has the model_max_length {shown(longest)}: expected a number of tokens")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(tokenizer, "add_eos_token", False):
        # not by its setter, which would make a new post-processor out of the tokenizer's settings
        object.__setattr__(tokenizer, "_add_eos_token" if backend is not None else "add_eos_token", False)
    if backend is not None and backend.post_processor is not None:
        config = json.loads(backend.to_str())
        if (changed := _without_end(config["post_processor"])) != config["post_processor"]:
            backend.post_processor = Tokenizer.from_str(json.dumps(config | {"post_processor": changed})).post_processor
    with_special, bare = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False))
    if with_special[len(with_special) - len(bare) :] != bare:
        raise BadInput(
            f"the tokenizer closes every text with '{tokenizer.decode(with_special[-1:])}': expected one that "
            "adds nothing behind a text"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None and tokenizer.eos_token_id < rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _without_end(processor: dict) -> dict:
    """The post-processor of a tokenizer.json without the special tokens that it appends."""
    if processor["type"] == "Sequence":
        return processor | {"processors": [_without_end(part) for part in processor["processors"]]}
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):  # [cls] text [sep]
        first, number = processor["cls"]
        begin = {"SpecialToken": {"id": first, "type_id": 0}}
        text, second = ({"Sequence": {"id": id_, "type_id": 0}} for id_ in "AB")
        special = {first: {"id": first, "ids": [number], "tokens": [first]}}
        single = [begin, text]
        return {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, second],
            "special_tokens": special,
        }
    if processor["type"] != "TemplateProcessing":
        return processor
    changed = dict(processor)
    for form in ("single", "pair"):
        parts = list(processor[form])
        while parts and "SpecialToken" in parts[-1]:
            parts.pop()
        changed[form] = parts
    return changed


def pad_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """The token to pad with: the tokenizer's own, else the end token, else token 0.

    It always has a row of the embedding, since it is masked in attention but embedded all the same.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None and 0 <= token < rows), 0)


def rows_of(model: PreTrainedModel) -> int:
    """The number of rows of the model's embedding."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def longest_context(model: PreTrainedModel) -> int | None:
    """The largest number of positions by the model's configuration; None if that has none."""
    return getattr(model.config, "max_position_embeddings", None)


def check_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor | Iterable[Sequence[int]]
) -> None:
    """Check that every token has a row in the model's embedding.

    Args:
        model: that will read the tokens; its weights need not be in memory.
        tokenizer: to spell the token in the message.
        ids: a tensor of tokens, or lists of them.

    Raises:
        BadInput: a token without a row, such as one that was added to the tokenizer only.
    """
    rows = rows_of(model)
    largest = int(ids.max()) if isinstance(ids, torch.Tensor) else max((max(row) for row in ids if len(row)), default=0)
    if largest >= rows:
        raise BadInput(
            f"token {largest} '{tokenizer.convert_ids_to_tokens(largest)}' of the text has no row in the model's "
            f"embedding, which has {rows}: "
            "expected text without it, or a checkpoint whose embedding was resized for its tokenizer"
        )


def check_windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> None:
    """Check that the model can read windows (N, T): every token has a row, and T is within its context.

    Raises:
        BadInput: a token without a row, or windows longer than the model's context.
    """
    check_tokens(model, tokenizer, ids)
    most = longest_context(model)
    if most is not None and ids.shape[1] > most:
        raise BadInput(
            f"windows of {ids.shape[1]} tokens are longer than the model's context (max_position_embeddings "
            f"{most}): use a length up to {most}"
        )
