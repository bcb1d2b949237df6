"""The gain of dropping finished rows from the batch: our loop against transformers' `generate`, on closed-book and
open-book questions."""

import statistics
import time

from transformers import GenerationConfig

from thesislib.evaluate.generate import continuations
from thesislib.formats.load import load_subject
from thesislib.model.prompts import adds_bos, default_prompt, end_tokens, prompt_for
from thesislib.sources.corpus import questions


def leaving_against_generate(repeats: int = 3, batch: int = 16, new: int = 50) -> dict:
    """Median seconds of one batch, closed book and open book, in turns, and how many rows are equal (bfloat16 may round
    differently in a smaller batch)."""
    subject = load_subject(dtype="bfloat16")
    tokenizer, ends = subject.tokenizer, end_tokens(subject)
    config = GenerationConfig(
        max_new_tokens=new, min_new_tokens=1, do_sample=False, repetition_penalty=1.0, eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    result = {}
    for book in ("closed book", "open book"):
        asked = questions(limit=batch, open_book=book == "open book")
        prompts = [prompt_for(subject, q, default_prompt(subject)) for q in asked]
        special = adds_bos(subject, prompts[0])
        encoded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=special, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        samples = []
        for _ in range(repeats + 1):  # the first is the warm-up
            start = time.perf_counter()
            ours = continuations(subject, ids, mask, new)
            between = time.perf_counter()
            whole = subject.model.generate(ids, attention_mask=mask, generation_config=config)
            theirs = whole[:, ids.shape[1] :].tolist()
            samples.append((between - start, time.perf_counter() - between))
        ours_s, theirs_s = (statistics.median(column) for column in zip(*samples[1:], strict=True))
        same = sum(row == other[: len(row)] for row, other in zip(ours, theirs, strict=True))
        result[book] = {
            "ours_s": round(ours_s, 2),
            "generate_s": round(theirs_s, 2),
            "ratio": round(ours_s / theirs_s, 3),
            "same_rows": f"{same} of {batch}",
            "prompt_tokens": ids.shape[1],
            "new_tokens": [min(map(len, ours)), int(statistics.median(map(len, ours))), max(map(len, ours))],
        }
    return result
