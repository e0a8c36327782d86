"""Records as NumPy archives: what is read back is what was written, and other archives are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradflow as gf
from gradflow.errors import RecordFormatError
from tests.records.saving.samples import full_record
from tests.samples import chain_record


def stored(path: Path) -> dict[str, Any]:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def changed(path: Path, **entries: Any) -> Path:
    """Write an archive anew with other entries; None leaves one out."""
    kept = {name: value for name, value in (stored(path) | entries).items() if value is not None}
    with path.open("wb") as file:
        np.savez(file, **kept)
    return path


def text(data: Any) -> Any:
    return np.frombuffer(json.dumps(data).encode(), dtype=np.uint8)


def test_every_field_is_read_back_as_it_was(tmp_path: Path) -> None:
    record = full_record()
    record.to_npz(tmp_path / "record")
    again = gf.FlowRecord.from_npz(tmp_path / "record")
    assert again == record
    assert again.to_json() == record.to_json()
    assert not again.losses.flags.writeable


def test_a_measured_record_is_read_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    batches = [torch.randn(6, 4), torch.full((6, 4), float("nan")), torch.randn(6, 4)]
    record = gf.analyze(model, batches, lambda y: y.square().mean(), steps=3, detail="full")
    record.to_npz(tmp_path / "record.npz")
    assert gf.FlowRecord.from_npz(str(tmp_path / "record.npz")).to_json() == record.to_json()


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.lists(st.floats(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_any_numbers_are_read_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]]
) -> None:
    record = chain_record(len(rows), 3)
    layers = [attrs.evolve(x, grad_norm=row) for x, row in zip(record, rows, strict=True)]
    path = tmp_path_factory.mktemp("records") / "record.npz"
    attrs.evolve(record, layers=layers).to_npz(path)
    for one, other in zip(layers, gf.FlowRecord.from_npz(path), strict=True):
        assert one.grad_norm.tobytes() == other.grad_norm.tobytes()


def test_it_is_smaller_than_json(tmp_path: Path) -> None:
    record = chain_record(60)
    record.to_npz(tmp_path / "record.npz")
    assert (tmp_path / "record.npz").stat().st_size < len(record.to_json()) / 5


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no archive")
    np.save(tmp_path / "one.npy", np.ones(2))
    np.savez(tmp_path / "pickled.npz", json=np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", values=np.ones(2))
    for name in ("text", "one.npy", "pickled.npz"):
        with pytest.raises(RecordFormatError, match="expected a NumPy archive without pickled objects"):
            gf.FlowRecord.from_npz(tmp_path / name)
    with pytest.raises(RecordFormatError, match="an archive without the entry 'json'"):
        gf.FlowRecord.from_npz(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        gf.FlowRecord.from_npz(tmp_path / "none.npz")


def test_what_was_changed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "record.npz"
    record = full_record()

    def refused(match: str, **entries: Any) -> None:
        record.to_npz(path)
        with pytest.raises(RecordFormatError, match=match):
            gf.FlowRecord.from_npz(changed(path, **entries))

    record.to_npz(path)
    data = json.loads(stored(path)["json"].tobytes())
    number = data["losses"]["$array"]
    losses = record.losses
    refused("expected an array .*, which is not there", **{str(number): None})
    refused(r"losses: expected an array of float64 with 1 axes", **{str(number): np.ones(3, int)})
    refused(r"losses: expected an array of float64 with 1 axes", **{str(number): losses[:, None]})
    refused(r"losses: expected .* entries, one for each step", **{str(number): losses[:-1]})
    refused("expected JSON", json=np.frombuffer(b"{", dtype=np.uint8))
    layers = data["layers"]
    short = layers | {"number": layers["number"] + 1}
    refused("values of each field", json=text(data | {"layers": short}))
    refused(
        "the fields of several records, and their number",
        json=text(data | {"layers": layers | {"number": "1"}}),
    )
    refused("expected format", json=text(data | {"format": 0}))


def test_an_archive_that_is_damaged_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.npz"
    chain_record(2, 2).to_npz(path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 31):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            gf.FlowRecord.from_npz(path)  # what zip files tell twice is read but once
        except RecordFormatError:
            refused += 1
    assert refused > len(whole) / 31 / 2
