"""The sample bundled in tests/data: real speech and photographs under free licences, and files that are broken on
purpose.

In: Debian packages. Out: ``speech/`` (LibriSpeech's layout), ``images/`` (a folder a class). The same packages give the
same files. ``tests/data/README.md`` names authors and licences; whoever adds a source here must add it there.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from tests.benchmarks.corpus import cut_tiles
from tests.benchmarks.debian import unpack_packages
from tests.benchmarks.prompts import PACKAGES as PROMPT_PACKAGES
from tests.benchmarks.prompts import SAMPLE_RATE, SPEAKERS, Prompt, list_prompts

SECONDS_PER_LANGUAGE = 136.0
CLIP_SECONDS = (1.5, 12.0)
# Photographs under CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0 and CC0; the packages' drawings and textures are left out.
PHOTOGRAPHS = {
    "aitzgorri": "lomiri-wallpapers-16.04/usr/share/backgrounds/aitzgorri_by_Aitzol_Berasategi.jpg",
    "bridge": "lomiri-wallpapers-16.04/usr/share/backgrounds/Bridge_by_Sander_Klootwijk.jpg",
    "brushes": "lomiri-wallpapers-16.04/usr/share/backgrounds/Picture_1A_by_freespace.jpg",
    "clock": "lomiri-wallpapers-16.04/usr/share/backgrounds/greentock_by_Peter_Nerlich.jpg",
    "dandelions": "lomiri-wallpapers-16.04/usr/share/backgrounds/seeding_by_Clements_Engelhardt.jpg",
    "dogs": "lomiri-wallpapers-16.04/usr/share/backgrounds/friends_by_Aitzol_Berasategi.jpg",
    "dragonfly": "lomiri-wallpapers-16.04/usr/share/backgrounds/Dragonfly_by_Bolly.jpg",
    "fig": "lomiri-wallpapers-16.04/usr/share/backgrounds/Picture_0B_by_freespace.jpg",
    "lamp": "lomiri-wallpapers-16.04/usr/share/backgrounds/free_by_Peter_Nerlich.jpg",
    "mountains": "lomiri-wallpapers-16.04/usr/share/backgrounds/picosdeeuropa_by_Aitzol_Berasategi.jpg",
    "nuthatch": "lomiri-wallpapers-20.04/usr/share/backgrounds/Kleiber_by_Lukas_Baubkus.jpg",
    "stream": "lomiri-wallpapers-16.04/usr/share/backgrounds/life_by_Aitzol_Berasategi.jpg",
    "sunset": "lomiri-wallpapers-16.04/usr/share/backgrounds/sunset_by_Aitzol_Berasategi.jpg",
    "wine": "lomiri-wallpapers-16.04/usr/share/backgrounds/Wine_by_Jakkub_Mede.jpg",
}
TILE = 128
SHORTER_SIDE = 512  # of the downscaled photograph: a tile then shows a thing, not a texture


def make_sample(cache: Path, out: Path) -> None:
    """Write ``out/speech`` and ``out/images`` anew; ``cache`` is for the downloads."""
    photograph_packages = sorted({path.split("/")[0] for path in PHOTOGRAPHS.values()})
    folders = unpack_packages([*PROMPT_PACKAGES, *photograph_packages], cache)
    for part in ("speech", "images"):
        shutil.rmtree(out / part, ignore_errors=True)
    chosen = choose_prompts(list(list_prompts(folders)))
    for prompt in chosen:
        folder = out / "speech" / prompt.speaker / prompt.chapter
        folder.mkdir(parents=True, exist_ok=True)
        # Steps of 12 bits, so that more speech fits into a megabyte: their noise lies 70 dB below full scale.
        waveform = np.round(prompt.decode() * 2048) / 2048
        soundfile.write(folder / f"{prompt.stem}.flac", waveform, SAMPLE_RATE, "PCM_16", compression_level=1.0)
    tiles = 0
    for label, place in PHOTOGRAPHS.items():
        photograph = Image.open(cache / place).convert("RGB")
        scale = SHORTER_SIDE / min(photograph.size)
        size = (round(photograph.width * scale), round(photograph.height * scale))
        folder = out / "images" / label
        folder.mkdir(parents=True, exist_ok=True)
        for name, tile in cut_tiles(photograph.resize(size, Image.Resampling.LANCZOS), TILE):
            tile.save(folder / f"{label}-{name}.jpg", quality=92)
            tiles += 1
    break_files(out)
    minutes = sum(prompt.seconds for prompt in chosen) / 60
    print(f"sample: {minutes:.1f} min of speech in {len(chosen)} clips, {tiles} tiles")


def choose_prompts(prompts: list[Prompt]) -> list[Prompt]:
    """The same duration of each language: half of the clips from the longer half, in an order that no one chose."""
    chosen: list[Prompt] = []
    for language in SPEAKERS:
        fitting = [
            prompt
            for prompt in prompts
            if prompt.language == language and CLIP_SECONDS[0] <= prompt.seconds <= CLIP_SECONDS[1]
        ]
        fitting.sort(key=lambda prompt: hashlib.sha256(prompt.stem.encode()).digest())
        middle = float(np.median([prompt.seconds for prompt in fitting]))
        longer = [prompt for prompt in fitting if prompt.seconds >= middle]
        shorter = [prompt for prompt in fitting if prompt.seconds < middle]
        total = 0.0
        while total < SECONDS_PER_LANGUAGE and (longer or shorter):
            for pool in (longer, shorter):
                if pool:
                    chosen.append(pool.pop(0))
                    total += chosen[-1].seconds
    return chosen


def break_files(out: Path) -> None:
    """Put six files among the good ones that preparation must refuse."""
    speech, images = out / "speech" / "carlo-it" / "prompts", out / "images" / "bridge"
    clip = max((out / "speech").rglob("*.flac"), key=lambda path: (path.stat().st_size, path.name)).read_bytes()
    (speech / "broken-truncated.flac").write_bytes(clip[: len(clip) // 4])
    (speech / "broken-empty.flac").write_bytes(b"")
    (speech / "broken-text.flac").write_text("This is no sound, whatever its name says.\n")
    tile = max((out / "images").rglob("*.jpg"), key=lambda path: (path.stat().st_size, path.name)).read_bytes()
    (images / "broken-truncated.jpg").write_bytes(tile[: len(tile) // 2])
    (images / "broken-empty.jpg").write_bytes(b"")
    (images / "broken-text.jpg").write_text("This is no picture, whatever its name says.\n")
