"""What a tokenizer adds by itself taken off, and tokens looked at before a model meets them."""

import json
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thesislib.errors import BadInput, shown


def prepared(tokenizer: PreTrainedTokenizerBase, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer, changed so that it closes no text by itself; what it puts in front (Llama's first token) stays.

    With an end token behind it a prompt is over before the answer, and a context in multiple choice is one token longer
    than the text that it begins. A missing padding token becomes the end token, if that one has a row.

    Args:
        tokenizer: as transformers loaded it.
        rows: of the model's embedding.

    Raises:
        BadInput: a tokenizer that goes on closing texts, or whose longest text is no number.
    """
    if isinstance(longest := tokenizer.model_max_length, bool) or not isinstance(longest, (int, float)):
        raise BadInput(f"tokenizer_config.json has the model_max_length {shown(longest)}: expected a number of tokens")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(tokenizer, "add_eos_token", False):
        # not by its setter, which makes a new post-processor out of what the tokenizer's settings say
        object.__setattr__(tokenizer, "_add_eos_token" if backend is not None else "add_eos_token", False)
    if backend is not None and backend.post_processor is not None:
        plain = json.loads(backend.to_str())
        if (opened := _opened(plain["post_processor"])) != plain["post_processor"]:
            backend.post_processor = Tokenizer.from_str(json.dumps(plain | {"post_processor": opened})).post_processor
    with_special, bare = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False))
    if with_special[len(with_special) - len(bare) :] != bare:
        raise BadInput(
            f"the tokenizer closes every text with '{tokenizer.decode(with_special[-1:])}': expected one that "
            "adds nothing behind a text"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None and tokenizer.eos_token_id < rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _opened(processor: dict) -> dict:
    """The post-processor of a tokenizer.json without the special tokens behind a text."""
    kind = processor["type"]
    if kind == "Sequence":
        return processor | {"processors": [_opened(part) for part in processor["processors"]]}
    if kind in ("BertProcessing", "RobertaProcessing"):  # [cls] text [sep]
        text, (first, number) = {"Sequence": {"id": "A", "type_id": 0}}, processor["cls"]
        begin = {"SpecialToken": {"id": first, "type_id": 0}}
        return {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {first: {"id": first, "ids": [number], "tokens": [first]}},
        }
    if kind != "TemplateProcessing":
        return processor
    changed = dict(processor)
    for form in ("single", "pair"):
        parts = list(processor[form])
        while parts and "SpecialToken" in parts[-1]:
            parts.pop()
        changed[form] = parts
    return changed


def pad_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """A token to pad with: the tokenizer's own, else the end token, else the first; always one with a row, since it is
    masked but embedded."""
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in named if token is not None and 0 <= token < rows), 0)


def rows_of(model: PreTrainedModel) -> int:
    """How many tokens the model's embedding has rows for."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def longest_context(model: PreTrainedModel) -> int | None:
    """How many positions the model's configuration allows; None where it does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def check_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor | Iterable[Sequence[int]]
) -> None:
    """Every token has a row in the model's embedding.

    Args:
        model: that the tokens are for; its weights need not be in memory.
        tokenizer: to name the token.
        ids: a tensor of tokens, or lists of them.

    Raises:
        BadInput: a token without a row, such as one that was added to the tokenizer and not to the model.
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
    """Windows (N, T) that the model can read: tokens with rows, no more of them than it has positions.

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
