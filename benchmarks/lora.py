"""LoRA training side by side with a bare forward-backward loop of the same model and batch: see benchmarks.__main__."""

import itertools
from collections.abc import Callable

import torch

from benchmarks.timing import in_turns
from thesislib.compress.lora.sequences import sequences
from thesislib.compress.lora.stage import Lora
from thesislib.compress.lora.train import Training
from thesislib.compress.training import bfloat16_is_fast, indices
from thesislib.formats.load import load_subject


def lora_against_bare_loop(autocast: bool | None = None, batch: int = 4, steps: int = 1, repeats: int = 3) -> dict:
    """Tokens per second on WikiText-like text, the thesis's adapters, `batch` sequences of 512, autocast as by default.

    Ours is the whole step: data, loss, backward, clipping, optimiser, schedule. Bare is only `model(ids, labels=ids)`
    and `backward()` of the same model, with its adapters, dropout and dtypes.
    """
    subject = load_subject()
    autocast = bfloat16_is_fast(subject.device) if autocast is None else autocast
    config = Lora(batch=batch, accumulate=1, autocast=autocast)
    train = sequences("wikitext", subject, "embedded", validation=0).train
    torch.manual_seed(0)
    training = Training(config, subject, config.shared_keys(subject), autocast)
    model = training.subject.model.train()

    def ours(number: int) -> None:
        training.step(train, number)

    def bare(number: int) -> None:
        ids = train.ids[indices(len(train), 0, (number - 1) * config.batch, config.batch)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    def run(step: Callable[[int], None]) -> Callable[[], None]:
        numbers = itertools.count(1)
        step(next(numbers))  # warms up

        def several() -> None:
            for number in itertools.islice(numbers, steps):
                step(number)

        return several

    tokens = steps * config.batch * config.length
    times = in_turns({"ours": run(ours), "bare": run(bare)}, repeats)
    a, b = (tokens / s for s in times.values())
    rates = {"tokens_per_s": round(a), "bare_tokens_per_s": round(b), "ratio": round(a / b, 3)}
    return {"autocast": autocast, **rates, "bar": ">= 0.8"}


if __name__ == "__main__":
    for autocast in (True, False):
        print(lora_against_bare_loop(autocast), flush=True)
