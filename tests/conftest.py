"""Stand-ins that need no network: a tiny random model with a byte tokenizer, and the real ones where they can be
had."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from thesislib.formats.load import load_subject
from thesislib.model.blocks import apply_plan
from thesislib.model.subject import Subject
from thesislib.sources.rows import SOURCES

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = ["alpha", "beta", "gamma", "delta", "of", "the", "and"]


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token a byte, so every text comes back; characters of several bytes share their offsets."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "extra_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHATML, **special)


@pytest.fixture(scope="session")
def tiny(byte_tokenizer):
    """A factory of small random subjects. Their weights are large enough (0.2) for every block to matter."""

    def make(model_type="llama", layers=6, seed=0, **config):
        settings = {
            "vocab_size": len(byte_tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
            "initializer_range": 0.2, "tie_word_embeddings": True, "bos_token_id": None,
            "eos_token_id": byte_tokenizer.eos_token_id, "pad_token_id": byte_tokenizer.pad_token_id,
        }  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                CONFIG_MAPPING[model_type](**(settings | config)), dtype=torch.float32
            ).eval()
        return Subject(model.requires_grad_(False), byte_tokenizer, f"tiny {model_type}")

    return make


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data folder with some training, calibration and evaluation data; its path."""
    root, r = tmp_path_factory.mktemp("text"), random.Random(0)
    prose = {
        half: [row for i in range(20) for row in (f" = {half} {i} = \n", " ".join(r.choices(WORDS, k=60)) + "\n")]
        for half in ("Train", "Test")
    }
    answer = {"value": "number", "aliases": ["number"]}
    tables = {
        "wikitext_train": [{"text": t} for t in prose["Train"]],
        "wikitext": [{"text": t} for t in prose["Test"]],
        "calibration_wikipedia": [{"text": " ".join(r.choices(WORDS, k=300)) + "."} for i in range(30)],
        "calibration_c4": [{"text": " ".join(r.choices(WORDS, k=300)) + "."} for i in range(30)],
        "trivia_train": [{"question": f"What is {i}?", "answer": {"value": f"number {i % 7}"}} for i in range(200)],
        "trivia": [{"question_id": str(i), "question": f"Who is {i}?", "answer": answer} for i in range(4)],
        "trivia_open": [
            {
                "question_id": str(i),
                "question": f"Who is {i}?",
                "answer": answer,
                "ctxs": [{"text": "Of a number.", "has_answer": True}],
            }
            for i in range(4)
        ],
    }
    for task, rows in tables.items():
        path = root / f"{SOURCES[task].folder}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A module's tests work in a cache of their own, on the embedded text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THESISLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("THESISLIB_DATA", raising=False)
        yield


@pytest.fixture(scope="session")
def embedded_subject():
    """The real model, float32. Shared by all tests: do not change it."""
    return load_subject("embedded")


@pytest.fixture(scope="session")
def few_blocks(embedded_subject):
    """The real tokenizer and scale of logits at a seventh of the cost, for what two ways of computing agree on."""
    return apply_plan(embedded_subject, (0, 1, 28, 29))


@pytest.fixture(scope="session")
def shared_data():
    """The folder that THESISLIB_DATA names."""
    folder = os.environ.get("THESISLIB_DATA")
    if not folder:
        pytest.skip("THESISLIB_DATA names no data folder")
    return Path(folder)
