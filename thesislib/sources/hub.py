"""The Hugging Face Hub: models by name, and within seconds an error of one line when it cannot be reached."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thesislib.errors import BadInput, shown

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def hub_folder(name: str, revision: str | None = None) -> Path:
    """The local copy of a model repository, downloaded if it is not cached.

    Raises:
        BadInput: no such repository, no permission, or no network and no cached copy.
    """
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=unreachable()))
    except Exception as error:  # network, gated, missing: the hub's own classes change between versions
        raise hub_error(f"model '{name}'", error) from error


def hub_error(name: str, error: Exception) -> BadInput:
    """The error of one line for anything that goes wrong with the Hub, with a remedy; `name` could not be fetched."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
    proxy = unusable_proxy()
    remedy = f"{proxy}; check the name and the network too" if proxy else "check the name and the network"
    return BadInput(
        f"{name} could not be fetched from the Hugging Face Hub ({type(error).__name__}: {first}): {remedy}, log in "
        "with `hf auth login` if it is gated, or give a folder or 'embedded' instead"
    )


def unusable_proxy() -> str | None:
    """A message about a proxy variable in the environment that no HTTP client accepts; None if there is none."""
    import httpx

    for variable in (spelling for name in PROXIES for spelling in (name, name.lower())):
        if not (value := os.environ.get(variable)):
            continue
        try:
            httpx.Client(proxy=value).close()
        except ImportError:
            return (
                f"{variable} names a SOCKS proxy, which needs the package socksio: pip install socksio, or "
                f"unset {variable}"
            )
        except Exception as error:  # no URL, no port, an unknown scheme: each has its own class
            return (
                f"{variable} is {shown(value)}, which is no proxy ({error}): expected such as "
                f"http://HOST:PORT, or unset {variable}"
            )
    return None


def unreachable(timeout_s: float = 5) -> bool:
    """Whether the Hub is switched off (HF_HUB_OFFLINE) or does not answer.

    The Hub's own clients would retry for half a minute before they give up.
    """
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        httpx.head(constants.ENDPOINT, timeout=timeout_s, follow_redirects=True)
        return False
    except Exception:  # not only httpx's own: a proxy in the environment can raise others
        return True


@contextmanager
def cached_only(offline: bool) -> Iterator[None]:
    """Inside the block, if `offline`, huggingface_hub and datasets read their caches and do not ask the Hub.

    datasets 5.2 ignores its own local_files_only. Proxy variables are hidden too: an unusable proxy would keep the
    cache from being read although nothing is asked.
    """
    import datasets
    from huggingface_hub import constants

    if not offline:
        yield
        return
    switches: tuple[Any, ...] = (constants, datasets.config)  # both are read at call time
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    proxies = {name: os.environ.pop(name) for name in list(os.environ) if name.upper() in PROXIES}
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        yield
    finally:
        os.environ.update(proxies)
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value
