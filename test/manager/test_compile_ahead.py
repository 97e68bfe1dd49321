"""What the log says of a compilation ahead of the first plan that came to nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from equipoise.jit.warming import warm_up_in_background
from equipoise.manager.warm_up import load_compiled_kernels


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path / "odd_compiler.py"


def test_a_compiler_that_fails_is_warned_of_with_its_last_words(
    compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.write_text("raise RuntimeError('no room for a cache')")
    load_compiled_kernels(warm_up_in_background("odd_compiler"))
    assert "compiling kernels ahead failed" in caplog.text
    assert "exit status 1" in caplog.text
    assert "RuntimeError: no room for a cache" in caplog.text


def test_so_are_the_words_of_what_it_forked(compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler.write_text(
        "import sys\nfrom equipoise.jit.warming import compile_side_by_side\n"
        "def share(): raise RuntimeError('this share fails')\n"
        "sys.exit(0 if compile_side_by_side([share]) else 1)"
    )
    load_compiled_kernels(warm_up_in_background("odd_compiler"))
    assert "RuntimeError: this share fails" in caplog.text


def test_one_that_is_cancelled_is_no_failure(compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler.write_text("import time\ntime.sleep(60)")
    compiling = warm_up_in_background("odd_compiler")
    waiting = threading.Thread(target=load_compiled_kernels, args=(compiling,))
    waiting.start()
    compiling.cancel()
    waiting.join(30)
    assert not waiting.is_alive()
    assert caplog.text == ""
