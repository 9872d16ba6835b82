"""The model hub, where one can be reached."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

_PROBE_SECONDS = 3.0


def use_cache_when_offline() -> bool:
    """Tells the hub's libraries to use their cache alone where the hub cannot be reached; returns whether it can be.

    They read the setting when they are first imported, and without it spend close to a minute on retries.  A proxy
    hides whether the hub is there, so with one the libraries find out themselves.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=_PROBE_SECONDS).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
    return True
