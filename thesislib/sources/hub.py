"""The Hugging Face Hub: models and data sets by name, and one clear line within seconds when it cannot be reached."""

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


def hub_error(what: str, error: Exception) -> BadInput:
    """One line for anything that goes wrong with the Hub, with what to do about it."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
    unusable = unusable_proxy()
    help_ = f"{unusable}; check the name and the network too" if unusable else "check the name and the network"
    return BadInput(f"{what} could not be fetched from the Hugging Face Hub ({type(error).__name__}: {first}): "
        f"{help_}, "
                    f"log in with `hf auth login` if it is gated, or give a folder or 'embedded' instead")  # fmt: skip


def unusable_proxy() -> str | None:
    """What the environment names as a proxy and no request can go through, with what helps; None for no such thing."""
    import httpx

    for name in PROXIES:
        for variable in (name, name.lower()):
            if value := os.environ.get(variable):
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
    """Whether the Hub shall not be asked, or does not answer: its clients retry for half a minute before they give
    up."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        httpx.head(constants.ENDPOINT, timeout=timeout_s, follow_redirects=True)
        return False
    except Exception:  # beside httpx's own, whatever a proxy in the environment makes it raise
        return True


@contextmanager
def cached_only(offline: bool) -> Iterator[None]:
    """Inside the block neither library asks the Hub, if `offline`: what datasets takes as local_files_only it does not
    look at (5.2).

    Where nothing will be asked, a proxy that no client can be made with shall not keep the cache from being read.
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
