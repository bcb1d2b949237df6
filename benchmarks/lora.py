"""LoRA training side by side with a bare forward-backward loop of the same model and batch: see benchmarks.__main__."""

import statistics
import time

import torch

from thesislib.compress.lora.sequences import sequences
from thesislib.compress.lora.stage import Lora
from thesislib.compress.lora.train import Training, bfloat16_is_fast, indices
from thesislib.formats.load import load_subject


def lora_against_bare_loop(autocast: bool | None = None, batch: int = 4, steps: int = 1, repeats: int = 3) -> dict:
    """Tokens per second on WikiText-like text, the thesis's adapters, `batch` sequences of 512, autocast as by default.

    Ours is the whole step: data, loss, backward, clipping, optimiser, schedule. Bare is `model(ids, labels=ids)` and
    `backward()`, nothing else, of the very same model: adapters, dropout, weights in the same types.
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

    seconds: dict = {ours: [], bare: []}
    for function in seconds:
        function(1)
    for repeat in range(repeats):
        for function, taken in seconds.items():  # in turns, so that a busy machine slows both
            start = time.perf_counter()
            for number in range(steps):
                function(2 + repeat * steps + number)
            taken.append(time.perf_counter() - start)
    tokens = steps * config.batch * config.length
    a, b = (tokens / statistics.median(taken) for taken in seconds.values())
    return {
        "autocast": autocast,
        "tokens_per_s": round(a),
        "bare_tokens_per_s": round(b),
        "ratio": round(a / b, 3),
        "bar": ">= 0.8",
    }


if __name__ == "__main__":
    for autocast in (True, False):
        print(lora_against_bare_loop(autocast), flush=True)
