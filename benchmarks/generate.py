"""Answers to 32 questions: transformers' generate on the whole batch, and rows that leave it once they have answered."""

import statistics
import time

import torch
from transformers import GenerationConfig

from thesislib.compress.plan import apply_plan
from thesislib.corpus import questions
from thesislib.evaluate.generate import continuations, end_tokens
from thesislib.prompts import adds_bos, prompt_for
from thesislib.subject import Subject, load_subject

QUESTIONS, NEW = 32, 50


def with_generate(subject: Subject, prompts: list[list[int]]) -> list[list[int]]:
    """What `greedy` did before: padded on the left, all rows up to the last one's end."""
    longest, pad, ends = max(map(len, prompts)), subject.tokenizer.pad_token_id, end_tokens(subject)
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    how = GenerationConfig(max_new_tokens=NEW, min_new_tokens=1, do_sample=False, eos_token_id=ends, pad_token_id=pad)
    with torch.inference_mode():
        rows = subject.model.generate(ids, attention_mask=mask, generation_config=how)[:, longest:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), NEW)] for row in rows]


def leaving_against_generate(repeats: int = 5) -> dict:
    """Median seconds of each, in turns: for the model, some of whose rows end early, and for one without 8 blocks, whose rows never end."""
    dense, asked = load_subject(dtype="bfloat16"), questions(limit=QUESTIONS)
    texts = [prompt_for(dense, q, "chat") for q in asked]
    prompts = sorted((dense.tokenizer(t, add_special_tokens=adds_bos(dense, t))["input_ids"] for t in texts), key=len, reverse=True)
    result = {}
    for name, subject in (("dense", dense), ("8 blocks removed", apply_plan(dense, [*range(12), *range(20, 30)]))):
        ways = {"generate_s": lambda s=subject: with_generate(s, prompts), "ours_s": lambda s=subject: continuations(s, prompts, NEW)}
        said = {way: function() for way, function in ways.items()}  # warm
        times = {way: [] for way in ways}
        for _ in range(repeats):
            for way, function in ways.items():
                start = time.perf_counter()
                function()
                times[way].append(time.perf_counter() - start)
        middle = {way: statistics.median(seen) for way, seen in times.items()}
        lengths = [len(row) for row in said["ours_s"]]
        result[name] = {
            **{way: round(seconds, 2) for way, seconds in middle.items()}, "ratio": round(middle["generate_s"] / middle["ours_s"], 2),
            "same_answers": sum(a == b for a, b in zip(*said.values(), strict=True)), "mean_tokens": statistics.mean(lengths),
            "rows_that_end_early": sum(n < NEW for n in lengths),
        }  # fmt: skip
    return {**result, "questions": QUESTIONS, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    print(leaving_against_generate())
