"""Preparation with real Ray on the bundled sample: what is stored, what is refused, and that repeating it changes
nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from data_prep import PreparationError, PreparationProgress, prepare, verify
from pipeline.data import ShardedDataset, read_manifest
from pipeline.data.storage import open_folder
from tests.conftest import IMAGE_SHARD_BYTES, SPEECH_SHARD_BYTES

pytestmark = pytest.mark.usefixtures("ray_cluster")


def quiet(progress: PreparationProgress) -> None:
    """Shows nothing."""


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_good_clip_is_stored_byte_for_byte(speech_dataset: Path, speech_source: Path) -> None:
    stored = {}
    for split in ("train", "validation"):
        dataset = ShardedDataset(speech_dataset, split)
        for index in range(len(dataset)):
            member = dataset.read(index)
            stored[member.metadata["source"]] = member
    files = {path.relative_to(speech_source).as_posix(): path for path in speech_source.rglob("*.flac")}
    good = {name for name in files if "broken" not in name}
    assert set(stored) == good
    for name in good:
        assert stored[name].content == files[name].read_bytes()
        assert stored[name].key == name.removesuffix(".flac")
        assert stored[name].metadata["label"] == name.split("/")[0]


def test_all_broken_files_are_in_quarantine(speech_dataset: Path, image_dataset: Path) -> None:
    for dataset, folder, suffix in (
        (speech_dataset, "carlo-it/prompts", "flac"),
        (image_dataset, "bridge", "jpg"),
    ):
        refused = {}
        for line in (dataset / "quarantine.jsonl").read_text().splitlines():
            entry = json.loads(line)
            refused[entry["path"]] = entry["reason"]
        names = [f"{folder}/broken-{what}.{suffix}" for what in ("empty", "text", "truncated")]
        assert list(refused) == names
        assert refused[names[0]] == "the file is empty"
        assert all(reason.startswith("not decodable as") for reason in list(refused.values())[1:])
        assert read_manifest(dataset).refused == 3


def test_totals_and_balance(speech_dataset: Path, image_dataset: Path) -> None:
    speech, images = read_manifest(speech_dataset), read_manifest(image_dataset)
    assert speech.samples == 208
    assert speech.seconds == pytest.approx(11.6 * 60, rel=0.01)
    assert images.samples == 280
    assert images.pixels == 280 * 128 * 128
    assert len(images.classes) == 14
    shards = speech.splits["train"].shards
    assert len(shards) == 9
    mean = np.mean([shard.bytes for shard in shards])
    assert all(abs(shard.bytes - mean) < 0.25 * mean for shard in shards)
    assert all(shard.bytes < 1.3 * SPEECH_SHARD_BYTES for shard in shards)


def test_stock_webdataset_reads_the_shards(speech_dataset: Path, image_dataset: Path) -> None:
    for path, suffix in ((speech_dataset, "flac"), (image_dataset, "jpg")):
        dataset = ShardedDataset(path)
        urls = [str(path / shard.file) for shard in dataset.manifest.splits["train"].shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [dataset.keys(index) for index in range(len(dataset))]
        for index, sample in enumerate(samples):
            assert sample[suffix] == dataset.read(index).content
            assert json.loads(sample["json"]) == dataset.read(index).metadata


def test_repeating_does_nothing(image_source: Path, image_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    shutil.copytree(image_dataset, out)
    before = digests(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    summary = prepare("image", image_source, out, shard_bytes=IMAGE_SHARD_BYTES, progress=quiet)
    assert summary.reused == summary.shards == len(times)
    assert digests(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == times


def test_a_lost_shard_is_made_again_with_the_same_bytes(
    image_source: Path, image_dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "images"
    shutil.copytree(image_dataset, out)
    before = digests(out)
    (out / "train" / "shard-000001.tar").unlink()
    (out / "train" / "shard-000002.idx").write_bytes(b"")
    (out / "train" / "shard-000000.tar.tmp-123").write_bytes(b"left by a killed worker")
    summary = prepare("image", image_source, out, shard_bytes=IMAGE_SHARD_BYTES, progress=quiet)
    assert summary.reused == summary.shards - 2
    assert digests(out) == before


def test_summary_and_progress(speech_source: Path, tmp_path: Path) -> None:
    seen: list[PreparationProgress] = []
    summary = prepare("speech", speech_source, tmp_path / "out", shard_bytes=4_000_000, workers=1, progress=seen.append)
    assert (summary.samples, summary.shards, summary.reused) == (208, 4, 0)
    assert summary.hours == pytest.approx(0.193, abs=0.002)
    assert summary.splits == {"train": 191, "validation": 17}
    assert [refusal.path.rpartition("-")[2] for refusal in summary.refused] == [
        "empty.flac",
        "text.flac",
        "truncated.flac",
    ]
    assert "208 clips, 0.19 h in 4 shards" in str(summary)
    assert seen[0].files_done == 0
    assert {progress.shards_done for progress in seen} == {0, 1, 2, 3, 4}
    assert (seen[-1].files_done, seen[-1].files, seen[-1].refused) == (211, 211, 3)
    assert seen[-1].bytes_done == seen[-1].bytes
    assert "211/211 files, 4/4 shards" in seen[-1].line()
    assert seen[-1].seconds_left == 0


def test_a_bad_file_stops_a_strict_preparation(image_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(PreparationError, match=r"bridge/broken-.*--on-bad quarantine"):
        prepare("image", image_source, out, on_bad="fail", progress=quiet)
    assert not (out / "manifest.json").exists()
    with pytest.raises(PreparationError, match=r"bridge/broken-"):
        prepare("image", image_source, out, on_bad="fail", progress=quiet)
    assert prepare("image", image_source, out, progress=quiet).samples == 280


def test_other_sources_or_settings_do_not_mix(image_source: Path, image_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    shutil.copytree(image_dataset, out)
    with pytest.raises(PreparationError, match="other files or settings"):
        prepare("image", image_source, out, shard_bytes=IMAGE_SHARD_BYTES, seed=1, progress=quiet)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("keep me")
    with pytest.raises(PreparationError, match="files that no preparation made"):
        prepare("image", image_source, tmp_path / "letters", progress=quiet)
    assert (tmp_path / "letters" / "mine.txt").read_text() == "keep me"


def test_a_source_of_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(PreparationError, match="all 1 files were refused"):
        prepare("speech", tmp_path / "source", tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_sound_is_resampled_and_pictures_are_scaled(tmp_path: Path) -> None:
    """One preparation each of a mixed folder: 44.1 kHz stereo and a large photograph become what training reads."""
    source = tmp_path / "source" / "speaker"
    source.mkdir(parents=True)
    time = np.arange(44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(source / "tone.wav", np.stack([tone, tone], axis=1), 44_100)
    Image.effect_noise((300, 200), 60).convert("RGB").save(source / "noise.png")
    speech = prepare("speech", source.parent, tmp_path / "speech", splits="train", progress=quiet)
    assert (speech.samples, speech.ignored) == (1, 1)
    member = ShardedDataset(tmp_path / "speech").read(0)
    assert member.metadata["source_rate"] == 44_100
    waveform, rate = soundfile.read(io.BytesIO(member.content))
    assert (rate, waveform.ndim) == (16_000, 1)
    spectrum = np.abs(np.fft.rfft(waveform))
    assert np.argmax(spectrum) == pytest.approx(440 * len(waveform) / 16_000, abs=1)
    prepare("image", source.parent, tmp_path / "images", splits="train", image_size=100, progress=quiet)
    images = ShardedDataset(tmp_path / "images")
    assert images.size(0) == (150, 100)
    assert images.manifest.image_size == 100


def test_listed_files_that_are_missing_are_set_aside(image_source: Path, tmp_path: Path) -> None:
    good = sorted(path for path in image_source.rglob("*.jpg") if "broken" not in path.name)[:3]
    (tmp_path / "list.txt").write_text("".join(f"{path}\tseen\n" for path in [*good, tmp_path / "gone.jpg"]))
    summary = prepare("image", tmp_path / "list.txt", tmp_path / "out", splits="train", progress=quiet)
    assert summary.samples == 3
    assert [refusal.reason for refusal in summary.refused] == ["can't be read: No such file or directory"]
    assert ShardedDataset(tmp_path / "out").manifest.classes == ["seen"]


def test_an_error_of_the_disk_is_told_with_the_shard(image_source: Path, tmp_path: Path) -> None:
    """A file stands where the records' folder should be: no fault of any source file, and the shard can't be done."""
    out = tmp_path / "out"
    (out / ".prepare").mkdir(parents=True)
    (out / ".prepare" / "train").write_text("in the way of the records")
    with pytest.raises(PreparationError, match=r"shard train/shard-000000 can't be written, .*repeat the command"):
        prepare("image", image_source, out, splits="train", progress=quiet)
    (out / ".prepare" / "train").unlink()
    assert prepare("image", image_source, out, splits="train", progress=quiet).samples == 280


def test_source_and_target_may_lie_in_an_object_store(
    s3: str, image_source: Path, image_dataset: Path, tmp_path: Path
) -> None:
    """The same bytes as from and to folders of this machine; a lost shard is made again."""
    store = open_folder(f"{s3}/{tmp_path.name}")
    for path in image_source.rglob("*.jpg"):
        store.write_whole(f"raw/{path.relative_to(image_source).as_posix()}", path.read_bytes())
    source, out = store.url("raw"), store.url("images")
    summary = prepare("image", source, out, shard_bytes=IMAGE_SHARD_BYTES, progress=quiet)
    assert (summary.samples, len(summary.refused), summary.reused) == (280, 3, 0)
    assert f"see {out}/quarantine.jsonl" in str(summary)
    made = {
        file.name: hashlib.sha256(open_folder(out).read(file.name)).hexdigest() for file in open_folder(out).files()
    }
    here = digests(image_dataset)
    ours = [name for name in here if not name.startswith(".prepare")]  # the records name the plan, and so the source
    assert {name: made[name] for name in ours} == {name: here[name] for name in ours}
    assert {name for name in made if not name.startswith(".prepare")} == set(ours)
    open_folder(out).remove("train/shard-000001.tar")
    summary = prepare("image", source, out, shard_bytes=IMAGE_SHARD_BYTES, progress=quiet)
    assert summary.reused == summary.shards - 1
    assert hashlib.sha256(open_folder(out).read("train/shard-000001.tar")).hexdigest() == here["train/shard-000001.tar"]
    with pytest.raises(PreparationError, match=f"{out} holds a data set of other files or settings"):
        prepare("image", source, out, shard_bytes=IMAGE_SHARD_BYTES, seed=1, progress=quiet)
    store.write_whole("mine/letter.txt", b"keep me")
    with pytest.raises(PreparationError, match=f"{store.place}/mine holds files that no preparation made"):
        prepare("image", source, store.url("mine"), progress=quiet)


def test_long_recordings_become_pieces_with_keys_of_their_own(speech_source: Path, tmp_path: Path) -> None:
    summary = prepare("speech", speech_source, tmp_path / "out", splits="train", max_seconds=3.0, progress=quiet)
    dataset = ShardedDataset(tmp_path / "out")
    keys = [dataset.keys(index) for index in range(len(dataset))]
    assert len(set(keys)) == summary.samples > 208
    assert max(dataset.length(index) for index in range(len(dataset))) <= 3 * 16_000
    assert summary.hours == pytest.approx(0.193, abs=0.002)
    pieces = [index for index, key in enumerate(keys) if "~" in key]
    first = next(index for index in pieces if keys[index].endswith("~000001"))
    before = dataset.length(keys.index(keys[first].replace("~000001", "~000000")))
    metadata = dataset.read(first).metadata
    assert metadata["begins_at"] == before / 16_000
    assert keys[first].partition("~")[0] + ".flac" == metadata["source"]
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_seconds": 20.0}, "max_seconds=20 with kind=image: it is for speech"),
        ({"kind": "speech", "max_seconds": 0.5}, "max_seconds=0.5 with kind=speech: it is for speech, one second"),
        ({"check": "none"}, "check='none': use full or header"),
        ({"colour": "cmyk"}, "colour='cmyk': use keep or rgb or grey"),
        ({"image_format": "webp"}, "image_format='webp': use keep or jpeg"),
        ({"jpeg_quality": 0}, "jpeg_quality=0: use a number from 1 to 100"),
        ({"kind": "video"}, "kind='video': use speech or image"),
        ({"on_bad": "ignore"}, "on_bad='ignore': use quarantine or fail"),
        ({"shard_bytes": 0}, "shard_bytes=0"),
        ({"splits": "train=0.5"}, "sums to 0.5"),
        ({"kind": "speech", "image_size": 64}, "it is for images"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    image_source: Path, tmp_path: Path, options: dict[str, object], says: str
) -> None:
    kind = options.pop("kind", "image")
    with pytest.raises(ValueError, match=says):
        prepare(kind, image_source, tmp_path / "out", progress=quiet, **options)
    assert not (tmp_path / "out").exists()
