"""A neighbour's package that cannot be had is left out with its reason, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.mark.usefixtures("benchmark_modules", "no_registry")
def test_every_baseline_is_left_out_when_nothing_can_be_downloaded(tmp_path: Path) -> None:
    import algorithms_policies

    found, missing = algorithms_policies.baselines(tmp_path / "cache")
    assert found == {}
    assert set(", ".join(missing).split(", ")) == {
        "vllm",
        "sglang deepseek",
        "sglang deepseek_vec",
        "deepseek original",
        "ascend swift",
        "ascend flashlb",
    }
    assert all("cannot be downloaded" in reason for reason in missing.values())
    assert algorithms_policies.sources() == {}
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("benchmark_modules")
@pytest.mark.parametrize("text", [None, "import a_module_that_nobody_has", "1 / 0"])
def test_a_file_that_cannot_be_imported_leaves_no_module_behind(tmp_path: Path, text: str | None) -> None:
    import neighbours

    path = tmp_path / "theirs.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(neighbours.Unavailable, match=r"theirs\.py of sglang\.theirs cannot be imported"):
        neighbours.load_file("sglang.theirs", path)
    assert "sglang.theirs" not in sys.modules


@pytest.mark.usefixtures("benchmark_modules")
def test_traces_that_a_folder_lacks_are_named(tmp_path: Path) -> None:
    import algorithms_workloads

    (tmp_path / algorithms_workloads.GPT_OSS).touch()
    assert algorithms_workloads.missing_traces(tmp_path) == list(algorithms_workloads.TASKS["both"])
    assert algorithms_workloads.real_sequences(tmp_path) == []
    assert algorithms_workloads.mixed_sequences(tmp_path) == []
