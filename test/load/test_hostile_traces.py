"""LoadTrace.open on files that are not what they say: hostile, cut off, damaged."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from equipoise.errors import TraceError
from equipoise.formats import archive as archive_module
from equipoise.load.trace import LoadTrace
from helpers.traces import assert_equal, refusal, small_trace, write_npz


def test_missing_empty_and_special_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing")
    (tmp_path / "empty").touch()
    assert "empty" in refusal(tmp_path / "empty")
    (tmp_path / "text").write_text("hello")
    assert "neither" in refusal(tmp_path / "text")
    (tmp_path / "folder").mkdir()
    assert "directory" in refusal(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


class Evil:
    """Unpickling this creates a file: the proof that code ran."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_no_pickle_is_ever_run(tmp_path):
    target = tmp_path / "code_ran"
    torch.save({"logical_count": Evil(target)}, tmp_path / "torch.pt")
    np.savez(tmp_path / "object.npz", topk=np.array([[[Evil(target)]]], dtype=object))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"logical_count": Evil(target)}))
    assert "objects other than tensors" in refusal(tmp_path / "torch.pt")
    assert "must hold numbers" in refusal(tmp_path / "object.npz")
    assert "neither" in refusal(tmp_path / "bare.pt")
    assert not target.exists()
    torch.load(tmp_path / "torch.pt", weights_only=False)  # the file would do harm, were it trusted
    assert target.exists()


@pytest.mark.parametrize("members", [["topk.npy"], ["archive/data.pkl", "archive/data/0"]])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, members):
    monkeypatch.setattr(archive_module, "MAX_BYTES", 1 << 20)
    path = tmp_path / "bomb"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(member, bytes(4 << 20))
    assert path.stat().st_size < 20_000
    assert "bytes when unpacked, more than the limit of 1 MiB" in refusal(path)


def test_a_whole_file_below_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "MAX_BYTES", 1 << 20)
    small_trace().save(tmp_path / "trace")
    assert_equal(LoadTrace.open(tmp_path / "trace"), small_trace())


@pytest.mark.parametrize("shape", [(1 << 40, 1, 1), (1 << 31, 1 << 31, 1 << 31), (-1, 2, 2), (3, 2, 2), (1, 2, 2)])
def test_a_shape_that_the_data_do_not_have_is_refused(tmp_path, shape):
    path = tmp_path / "shape.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("topk.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<i8", "fortran_order": False, "shape": shape})
        member.write(bytes(64))
    message = refusal(path)
    assert "more than the limit" in message or "should take" in message


def test_the_limit_holds_for_counts_made_from_tokens(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "t.npz", topk=np.full((1000, 1, 1), 999))
    monkeypatch.setattr(archive_module, "MAX_BYTES", 1_000_000)
    assert "logical_count of shape (1000, 1, 1000)" in _refused_with(path, tokens_per_step=1)
    assert LoadTrace.open(path, tokens_per_step=100).num_steps == 10


def _refused_with(path: Path, **options: int) -> str:
    with pytest.raises(TraceError) as caught:
        LoadTrace.open(path, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "equipoise.load_trace", "version": 2, "metadata": {}}, "version 2 of the format"),
        ({"format": "other", "version": 1, "metadata": {}}, "format"),
        ({"format": "equipoise.load_trace", "version": 1, "metadata": []}, "metadata must be a JSON object"),
        ([1], "format"),
        (
            {"format": "equipoise.load_trace", "version": 1, "metadata": {}, "arrays": ["logical_count", "x"]},
            "its header lists",
        ),
    ],
)
def test_headers_of_other_versions_and_formats_are_refused(tmp_path, header, message):
    encoded = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    path = write_npz(tmp_path / "h.npz", header=encoded, logical_count=np.ones((1, 1, 1), dtype=int))
    assert message in refusal(path)


def own_bytes() -> bytes:
    buffer = io.BytesIO()
    archive_module.write_archive(
        buffer,
        {
            "format": "equipoise.load_trace",
            "version": 1,
            "arrays": ["forward_pass_ids", "logical_count"],
            "metadata": {"source": "x" * 50},
        },
        {"logical_count": np.arange(40).reshape(5, 2, 4), "forward_pass_ids": np.arange(5)},
    )
    return buffer.getvalue()


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def token_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, topk=np.arange(60).reshape(15, 2, 2) % 7, seq_lens=np.array([15]))
    return buffer.getvalue()


WHOLE_FILES = [
    own_bytes(),
    token_bytes(),
    torch_bytes({"rank": 0, "logical_count": torch.ones(3, 2, 4, dtype=torch.int32)}),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 2), share=st.floats(0, 1, exclude_max=True))
@example(which=0, share=0.0)
def test_a_truncated_file_is_a_trace_error(which, share, tmp_path):
    whole = WHOLE_FILES[which]
    path = tmp_path / "cut"
    path.write_bytes(whole)
    LoadTrace.open(path)
    path.write_bytes(whole[: int(len(whole) * share)])
    refusal(path)


def test_a_damaged_name_of_a_member_is_a_trace_error(tmp_path):
    """Without the name of its header, the array in it would pass for one that is not ours."""
    damaged = WHOLE_FILES[0].replace(b"header.npyPK", b"\0eader.npyPK")
    (tmp_path / "damaged").write_bytes(damaged)
    assert "damaged" in refusal(tmp_path / "damaged")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), which=st.integers(0, 2))
def test_damaged_bytes_are_a_trace_error_or_do_not_matter(data, which, tmp_path):
    damaged = bytearray(WHOLE_FILES[which])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "whole").write_bytes(WHOLE_FILES[which])
    (tmp_path / "damaged").write_bytes(damaged)
    try:
        found = LoadTrace.open(tmp_path / "damaged")
    except TraceError:
        refusal(tmp_path / "damaged")
        return
    # Dates and attributes of a zip say nothing about its content; checksums guard what does.
    assert_equal(found, LoadTrace.open(tmp_path / "whole"))
