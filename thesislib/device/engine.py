"""llama.cpp on one pinned thread, in a process of its own: `python -m thesislib.device.engine` takes a request as JSON
and answers with every sample.

It has its own process for three reasons: the peak memory is then the engine's, the thread shares no core with ours, and
a file that makes the engine abort does not end this process. It imports neither torch nor the rest of thesislib.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from thesislib.errors import BadInput

HOW_TO_GET_IT = (
    "llama.cpp is not installed: in the checkout, pip install -e '.[engine]' -c constraints.txt "
    "builds it, which takes about 8 minutes on two cores and needs a C++ compiler"
)


@dataclass(frozen=True)
class Request:
    """A request to the engine.

    Attributes:
        file: a GGUF file.
        prompts: the token ids of each.
        tokens: how many to decode greedily after each prompt; the first comes from the prompt's own pass.
        repeats: how often each prompt runs.
        warm_up: runs before the samples.
        core: that the thread is pinned to; None for any.
        exact: whether keys and values are in float32 and attention is not fused, as in transformers. llama.cpp's
            default is float16 and fused.
    """

    file: str
    prompts: list[list[int]]
    tokens: int = 33
    repeats: int = 1
    warm_up: int = 0
    core: int | None = None
    exact: bool = False


def run_engine(request: Request, timeout: float = 3600) -> dict[str, Any]:
    """Run a request in a new process.

    Returns:
        {"samples": for each prompt and repetition {"prompt": its number, "ids": the chosen tokens, "seconds": of the
        prompt's pass and of each token after it, "cpu": the same in CPU seconds of the thread, "others": how many cores
        other processes kept busy meanwhile}, "bytes": {"weights", "cache", "resident before", "resident": its peak},
        "versions": {...}}.

    Raises:
        BadInput: llama.cpp is not installed; no such file; the engine cannot load the file, or its context is too
            short; it takes longer than `timeout` seconds.
    """
    if find_spec("llama_cpp") is None:
        raise BadInput(HOW_TO_GET_IT)
    if not Path(request.file).is_file():
        raise BadInput(
            f"{request.file} is no file: expected a GGUF file, such as `thesislib export SUBJECT --gguf Q8_0` writes"
        )
    if not request.prompts or any(not p for p in request.prompts) or request.tokens < 1 or request.repeats < 1:
        raise BadInput(
            f"{len(request.prompts)} prompts, {request.tokens} tokens, {request.repeats} repeats: expected at "
            "least one each, and no empty prompt"
        )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "thesislib.device.engine"],
            input=json.dumps(asdict(request)),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise BadInput(
            f"the engine took longer than {timeout:.0f} s with {request.file}: ask for fewer tokens or repeats"
        ) from error
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise BadInput(
            f"llama.cpp cannot run {request.file} (exit code {done.returncode}): {' / '.join(why) or 'it said nothing'}"
        )
    return json.loads(done.stdout)


def busy_seconds() -> float | None:
    """The seconds that all cores together have been busy since the machine started; None if the system does not say."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    ticks = sum(fields[:3]) + sum(fields[5:8])  # user, nice, system; interrupts, soft interrupts, hypervisor
    return ticks / os.sysconf("SC_CLK_TCK")


def watched() -> Callable[[], float | None]:
    """Begin to watch the machine.

    Returns:
        A function that says how many cores other processes have kept busy since; None if the system does not say.
    """
    began, all_cores, mine = time.perf_counter(), busy_seconds(), time.process_time()

    def others() -> float | None:
        now = busy_seconds()
        if now is None or all_cores is None:
            return None
        return max(0.0, now - all_cores - (time.process_time() - mine)) / (time.perf_counter() - began)

    return others


def _resident() -> int:
    """The resident memory of this process, in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return _peak()


def _peak() -> int:
    """The peak resident memory of this program, in bytes. getrusage's would contain that of the process that started
    it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Answer one request."""
    request = Request(**json.load(sys.stdin))
    if request.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {request.core})
    import llama_cpp as ll

    messages: list[str] = []  # its log, which says why it failed
    # the callback is kept in a variable, or it would be garbage collected
    log = ll.llama_log_callback(lambda _level, text, _data: messages.append(text.decode("utf8", "replace")))
    ll.llama_log_set(log, None)
    before = _resident()
    model, context = _load(ll, request, messages)
    size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    if (largest := max(max(p) for p in request.prompts)) >= size:
        sys.exit(f"token {largest} is beyond the file's {size} tokens")

    def step(ids: list[int]) -> int:
        tokens = (ll.llama_token * len(ids))(*ids)
        if ll.llama_decode(context, ll.llama_batch_get_one(tokens, len(ids))):
            sys.exit("".join(messages[-4:]) or "decoding failed")
        return int(np.ctypeslib.as_array(ll.llama_get_logits_ith(context, -1), (size,)).argmax())

    def sample(prompt: int) -> dict[str, Any]:
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        ids, wall, cpu, feed, others = [], [], [], request.prompts[prompt], watched()
        for _ in range(request.tokens):
            at, cpu_at = time.perf_counter(), time.process_time()
            ids.append(step(feed))
            wall.append(time.perf_counter() - at)
            cpu.append(time.process_time() - cpu_at)
            feed = ids[-1:]
        return {"prompt": prompt, "ids": ids, "seconds": wall, "cpu": cpu, "others": others()}

    for _ in range(request.warm_up):
        sample(0)
    samples = [sample(prompt) for _ in range(request.repeats) for prompt in range(len(request.prompts))]
    answer = {
        "samples": samples,
        "bytes": {
            "weights": ll.llama_model_size(model),
            "cache": ll.llama_state_seq_get_size(context, 0),
            "resident before": before,
            "resident": _peak(),
        },
        "versions": {"llama_cpp_python": ll.__version__, "system": ll.llama_print_system_info().decode().strip(" |")},
    }
    json.dump(answer, sys.stdout)


def _load(ll, request: Request, messages: list[str]) -> tuple[Any, Any]:
    """The model of a request and a context for it; the process ends with llama.cpp's last messages if there is none."""
    options = ll.llama_model_default_params()
    options.n_gpu_layers = 0
    model = ll.llama_model_load_from_file(request.file.encode(), options)
    if not model:
        sys.exit("".join(messages[-8:]) or "the file cannot be loaded")
    room = max(map(len, request.prompts)) + request.tokens
    settings = ll.llama_context_default_params()
    settings.n_ctx = settings.n_batch = room
    settings.n_threads = settings.n_threads_batch = 1
    settings.no_perf = True
    if request.exact:
        settings.type_k = settings.type_v = ll.GGML_TYPE_F32
        settings.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = ll.llama_init_from_model(model, settings)
    if not context:
        sys.exit("".join(messages[-8:]) or f"no context of {room} tokens")
    return model, context


if __name__ == "__main__":
    main()
