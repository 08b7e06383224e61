"""Which reports of MAX are turned off."""

from __future__ import annotations

import os

import pytest

from unispec.telemetry import turn_off_telemetry

ENGINE, SERVER = "MODULAR_TELEMETRY_ENABLED", "OTEL_SDK_DISABLED"


@pytest.mark.parametrize("value", [None, "", "0", "false", "off", "no"])
def test_both_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    for name in (ENGINE, SERVER):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if value is not None:
        monkeypatch.setenv(ENGINE, value)
    turn_off_telemetry()
    assert (os.environ[ENGINE], os.environ[SERVER]) == ("0", "true")


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_who_asks_for_them_has_them(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(SERVER, "")
    monkeypatch.delenv(SERVER)
    monkeypatch.setenv(ENGINE, value)
    turn_off_telemetry()
    assert os.environ[ENGINE] == value and SERVER not in os.environ
