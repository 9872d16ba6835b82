"""Whether the model hub is there is found out quickly, not by a minute of retries."""

from __future__ import annotations

import os
import socket

import pytest

from gpt.text.hub import use_cache_when_offline


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "")  # so that the old value comes back after the test
        monkeypatch.delenv(name)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert not use_cache_when_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not use_cache_when_offline()


def test_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert use_cache_when_offline()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_behind_a_proxy_the_libraries_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert use_cache_when_offline()
    assert "HF_HUB_OFFLINE" not in os.environ
