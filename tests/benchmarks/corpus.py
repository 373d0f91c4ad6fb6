"""Hours of real speech and hundreds of photographs from Debian packages, for benchmarks and longer trials.

    python -m tests.benchmarks.corpus --out corpus               # all of it: 470 MB of downloads
    python -m tests.benchmarks.corpus --out corpus --only digits
    python -m tests.benchmarks.corpus --sample tests/data        # the small sample that is bundled with the tests

Out: ``speech/`` in LibriSpeech's layout (16 kHz FLAC), ``images/``, ``tiles/``, ``digits/`` and ``fashion/`` in
ImageNet's (a folder a class). Downloads with apt-get as any user, into ``OUT/.packages``. The packages' files stay on
this machine: some are under the GPL.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from PIL import Image

from tests.benchmarks.debian import unpack_packages
from tests.benchmarks.prompts import PACKAGES as PROMPT_PACKAGES
from tests.benchmarks.prompts import SAMPLE_RATE, list_prompts
from tests.benchmarks.qt_resources import read_members

GAME_SPEECH = ["fillets-ng-data-cs", "fillets-ng-data-nl"]
STAMPS = "tuxpaint-stamps-default"
GCOMPRIS = "gcompris-qt-data"
OPENCV = "opencv-doc"
WALLPAPERS = ["lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers"]
GCOMPRIS_PHOTOGRAPHS = {
    "categorization", "details", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals",
    "explore_world_music",
}  # fmt: skip
PLASMA_PHOTOGRAPHS = {
    "BytheWater", "ColdRipple", "ColorfulCups", "EveningGlow", "FallenLeaf", "Grey", "Kite", "OneStandsOut", "Path",
    "summer_1am",
}  # fmt: skip
TILE = 256
FASHION = "dataset-fashion-mnist"
FASHION_CLASSES = [
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
]  # fmt: skip


class SpeechTree:
    """Writes clips as ``<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac`` with LibriSpeech's transcript files."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seconds: Counter[str] = Counter()
        self._count: Counter[tuple[str, str]] = Counter()
        self._transcripts: dict[Path, list[str]] = defaultdict(list)

    def add(self, speaker: str, chapter: str, waveform: np.ndarray, rate: int, text: str = "") -> None:
        """Write one clip at 16 kHz; clips under 0.8 s, over 20 s or without sound are left out."""
        if waveform.ndim > 1:
            waveform = waveform.mean(axis=1)
        seconds = len(waveform) / rate
        if not 0.8 <= seconds <= 20 or np.abs(waveform).max() < 0.02:
            return
        if rate != SAMPLE_RATE:
            waveform = soxr.resample(waveform, rate, SAMPLE_RATE)
        stem = f"{speaker}-{chapter}-{self._count[speaker, chapter]:04d}"
        self._count[speaker, chapter] += 1
        folder = self.out / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{stem}.flac", np.clip(waveform, -1, 1), SAMPLE_RATE, subtype="PCM_16")
        self.seconds[speaker] += seconds
        if text:
            self._transcripts[folder / f"{speaker}-{chapter}.trans.txt"].append(f"{stem} {text}\n")

    def close(self) -> None:
        """Write the transcripts and say what there is."""
        for path, lines in self._transcripts.items():
            path.write_text("".join(lines), encoding="utf-8")
        hours, clips = sum(self.seconds.values()) / 3600, sum(self._count.values())
        print(f"speech: {hours:.2f} h in {clips} clips of {len(self.seconds)} speakers")


def make_speech(cache: Path, out: Path) -> None:
    """Acted dialogue (Czech, Dutch), spoken names in 13 languages, telephone prompts in 5: about 7 hours."""
    folders = unpack_packages([*GAME_SPEECH, STAMPS, *PROMPT_PACKAGES], cache)
    tree = SpeechTree(out)
    for package in GAME_SPEECH:
        language = package[-2:]
        for path in sorted(folders[package].rglob(f"sound/*/{language}/*.ogg")):
            actor = re.search(r"-([mv])-", path.name)  # the small or the big fish
            waveform, rate = soundfile.read(path, dtype="float32")
            if rate == 22_050:  # the few at 44.1 kHz are music
                tree.add(f"fillets-{language}-{actor[1] if actor else 'x'}", path.parts[-3], waveform, rate)
    stamps = folders[STAMPS] / "usr/share/tuxpaint/stamps"
    for path in sorted(stamps.rglob("*_desc_*.ogg")):
        found = re.match(r"(.*)_desc_(\w+)\.ogg", path.name)
        if found is None:
            continue
        waveform, rate = soundfile.read(path, dtype="float32")
        text = _stamp_text(path.with_name(f"{found[1]}.txt"), found[2])
        tree.add(f"stamps-{found[2]}", path.relative_to(stamps).parts[0], waveform, rate, text)
    for prompt in list_prompts(folders):
        if prompt.seconds >= 0.8:
            tree.add(prompt.speaker, prompt.chapter, prompt.decode(), SAMPLE_RATE)
    tree.close()


def _stamp_text(path: Path, language: str) -> str:
    if not path.exists():
        return ""
    found = re.search(rf"(?m)^{language}\.utf8=(.*)$", path.read_text(encoding="utf-8", errors="replace"))
    return found[1].strip() if found else ""


def make_images(cache: Path, out: Path) -> None:
    """About 550 labelled pictures, nine in ten of them photographs or cut-outs of photographs."""
    folders = unpack_packages([STAMPS, GCOMPRIS, OPENCV], cache)
    count: Counter[str] = Counter()
    for label, name, image in _labelled_pictures(folders):
        if looks_like_photograph(image):
            flat = Image.new("RGBA", image.size, "white")
            flat.alpha_composite(image.convert("RGBA"))
            folder = out / label
            folder.mkdir(parents=True, exist_ok=True)
            flat.convert("RGB").save(folder / f"{name}.JPEG", quality=92)
            count[label] += 1
    # Some names occur twice in a class, and the later picture stands.
    print(f"images: {len(list(out.rglob('*.JPEG')))} in {len(count)} classes")


def _labelled_pictures(folders: dict[str, Path]) -> Iterator[tuple[str, str, Image.Image]]:
    stamps = folders[STAMPS] / "usr/share/tuxpaint/stamps"
    for path in sorted(stamps.rglob("*.png")):
        yield "-".join(path.relative_to(stamps).parts[:-1][:2]), path.stem, Image.open(path)
    for path in sorted(folders[GCOMPRIS].rglob("*.rcc")):
        if path.stem not in GCOMPRIS_PHOTOGRAPHS:
            continue
        for name, content in read_members(path):
            if not name.endswith((".webp", ".jpg", ".jpeg", ".png")):
                continue
            image = Image.open(io.BytesIO(content))
            if min(image.size) >= 150:
                parts = name.split("/")
                label = f"{path.stem}-{parts[-2]}" if path.stem == "categorization" else path.stem
                yield label, parts[-1].rsplit(".", 1)[0], image
    for path in sorted((folders[OPENCV] / "usr/share/doc/opencv-doc/examples/data").glob("*.jpg")):
        yield "opencv-samples", path.stem, Image.open(path)


def looks_like_photograph(image: Image.Image) -> bool:
    """Whether the opaque part of a picture has the many colours that drawings lack."""
    small = image.convert("RGBA").resize((min(image.width, 256), min(image.height, 256)), Image.Resampling.NEAREST)
    pixels = np.asarray(small)  # (height, width, 4)
    opaque = pixels[pixels[..., 3] > 128][:, :3].astype(np.int64)
    return len(opaque) > 0 and len(np.unique(opaque @ np.array([65536, 256, 1]))) > 4000


def make_tiles(cache: Path, out: Path) -> None:
    """256-pixel tiles of 41 large photographs; the class is the photograph."""
    folders = unpack_packages(WALLPAPERS, cache)
    count: Counter[str] = Counter()
    for path in _large_photographs(folders):
        label = re.sub(r"\W+", "_", path.parts[-4] if path.parent.name == "images" else path.stem)
        for name, tile in cut_tiles(Image.open(path).convert("RGB"), TILE):
            folder = out / label
            folder.mkdir(parents=True, exist_ok=True)
            tile.save(folder / f"{name}.JPEG", quality=95)
            count[label] += 1
    print(f"tiles: {sum(count.values())} of {TILE} pixels from {len(count)} photographs")


def _large_photographs(folders: dict[str, Path]) -> Iterator[Path]:
    backgrounds = "usr/share/backgrounds"
    for package in WALLPAPERS[:2]:
        yield from sorted((folders[package] / backgrounds).glob("*.jpg"))
    yield from sorted((folders[WALLPAPERS[2]] / backgrounds / "mate/nature").glob("*.jpg"))
    for name in sorted(PLASMA_PHOTOGRAPHS):
        sizes = (folders[WALLPAPERS[3]] / "usr/share/wallpapers" / name / "contents/images").glob("*")
        yield from sorted(sizes, key=lambda path: path.stat().st_size)[-1:]


def cut_tiles(image: Image.Image, side: int, least_contrast: float = 12) -> Iterator[tuple[str, Image.Image]]:
    """Square tiles of an image that show something, with their place as their name."""
    for top in range(0, image.height - side + 1, side):
        for left in range(0, image.width - side + 1, side):
            tile = image.crop((left, top, left + side, top + side))
            if np.asarray(tile.convert("L")).std() > least_contrast:
                yield f"{top:05d}_{left:05d}", tile


def make_digits(cache: Path, out: Path) -> None:
    """5,000 handwritten digits, padded from 20 to MNIST's 28 pixels, 500 a class."""
    folder = unpack_packages([OPENCV], cache)[OPENCV]
    sheet = np.asarray(Image.open(folder / "usr/share/doc/opencv-doc/examples/data/digits.png").convert("L"))
    for number in range(5000):
        row, column = divmod(number, 100)
        digit = sheet[row * 20 : row * 20 + 20, column * 20 : column * 20 + 20]
        target = out / str(number // 500)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.pad(digit, 4)).save(target / f"{number:04d}.png")
    print("digits: 5000 of 28 × 28 pixels in 10 classes")


def make_fashion(cache: Path, out: Path) -> None:
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747), all of it: ``train/`` of 60,000 and ``test/`` of 10,000 images of
    28 × 28 pixels in 10 classes."""
    folder = unpack_packages([FASHION], cache)[FASHION] / "usr/share/datasets/fashion-mnist"
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")  # (number, 28, 28)
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        for name in FASHION_CLASSES:
            (out / split / name).mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(out / split / FASHION_CLASSES[label] / f"{split}-{number:05d}.png")
        print(f"fashion: {len(images)} images of {images.shape[1]} × {images.shape[2]} pixels, {split}")


def read_idx(path: Path) -> np.ndarray:
    """MNIST's format, gzipped: a header of 4 bytes, the sizes as big-endian numbers of 4 bytes, then unsigned bytes.

    Raises ValueError for a file of another type or size.
    """
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} begins with {content[:4]!r}: MNIST's files of bytes begin with 00 00 08")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


PARTS: dict[str, Callable[[Path, Path], None]] = {
    "speech": make_speech,
    "images": make_images,
    "tiles": make_tiles,
    "digits": make_digits,
    "fashion": make_fashion,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the corpus")
    where.add_argument("--sample", type=Path, help="folder for the small sample that is bundled with the tests")
    parser.add_argument("--cache", type=Path, help="folder for downloaded packages (default: OUT/.packages)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts of the corpus")
    arguments = parser.parse_args()
    if arguments.sample is not None:
        from tests.benchmarks.sample import make_sample

        if arguments.cache is None:
            parser.error("--sample needs --cache FOLDER for the downloads, outside the repository")
        make_sample(arguments.cache, arguments.sample)
        return
    for part in arguments.only:
        PARTS[part](arguments.cache or arguments.out / ".packages", arguments.out / part)


if __name__ == "__main__":
    main()
