"""What `tessera inspect` tells of each kind of folder and file."""

import pytest

from launch.inspect import contents


def test_a_data_set_is_told_by_split(speech_dataset):
    kind, facts = contents(speech_dataset)
    assert kind == "data set"
    assert facts["kind"] == "speech"
    assert facts["classes"].startswith("5: ")
    assert facts["split train"].startswith("191 samples, 0.1")
    assert facts["split validation"].startswith("17 samples, ")


def test_a_shard_is_told_by_its_members(image_dataset):
    shard = sorted(image_dataset.glob("train/*.tar"))[0]
    kind, facts = contents(shard)
    assert kind == "shard"
    assert facts["members"] == f"{facts['samples']} × .jpg, {facts['samples']} × .json"


def test_what_is_none_of_these_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a run"):
        contents(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        contents(tmp_path / "nowhere")
    broken = tmp_path / "shard-000000.tar"
    broken.write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="is not a readable tar"):
        contents(broken)
