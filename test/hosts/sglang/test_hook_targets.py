"""A hook target that is not what it was is found before anything is hooked."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from equipoise.hosts.sglang.hook_targets import HookTarget
from equipoise.hosts.sglang.launch.versions import SUPPORTED, version_complaint


@pytest.fixture
def srt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in the place of ``sglang.srt``."""
    package, module = ModuleType("sglang"), ModuleType("sglang.srt")

    class Thing:
        def act(self, first: int, second: int, *, later: int = 0) -> None: ...

        def needs_more(self, first: int, added: int) -> None: ...

        def takes_all(self, first: int, **rest: Any) -> None: ...

    module.Thing = Thing  # type: ignore[attr-defined]
    package.srt = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang", package)
    monkeypatch.setitem(sys.modules, "sglang.srt", module)
    return module


@pytest.mark.usefixtures("srt")
@pytest.mark.parametrize(
    ("path", "parameters", "complaint"),
    [
        ("Thing.act", ("first", "second"), None),
        ("Thing.act", ("first",), "needs a further argument, second"),
        ("Thing.act", ("second",), "takes (first, second, later), not (second)"),
        ("Thing.takes_all", ("first",), None),
        ("Thing.gone", (), "is missing"),
        ("nowhere.Thing", (), "is missing"),
    ],
)
def test_target_is_compared_with_what_is_installed(
    path: str, parameters: tuple[str, ...], complaint: str | None
) -> None:
    found = HookTarget(path, parameters).complaint()
    assert (complaint is None and found is None) or (complaint is not None and found is not None and complaint in found)


def test_versions(caplog: pytest.LogCaptureFixture) -> None:
    assert version_complaint(SUPPORTED) is None
    assert not caplog.records
    assert version_complaint("0.5.22") is None
    assert "0.5.22" in caplog.text
    for other in ("0.5.20", "0.5.24", "0.6.0"):
        complaint = version_complaint(other)
        assert complaint is not None
        assert other in complaint
        assert f"sglang=={SUPPORTED}" in complaint
        assert "\n" not in complaint
