"""Whether a sound file is whole, where the decoder would not say: it reads a cut WAV, Ogg or MP3 as a shorter sound.

In: a file's content. Out: what is wrong, or None. Reads headers of chunks, pages and frames, and decodes nothing. FLAC
is left to the decoder, which checks every frame.
"""

from __future__ import annotations

import struct

# Layer III: kbit/s by MPEG version 1 and by 2 and 2.5; samples a second by version.
_BITRATES = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {0: (11_025, 12_000, 8_000), 2: (22_050, 24_000, 16_000), 3: (44_100, 48_000, 32_000)}  # 2.5, 2, 1
_STREAMED = 0x7FFF_0000  # so large a size was written before the end was known


def what_is_cut(form: str, content: bytes, samples: int) -> str | None:
    """What shows that a file of libsndfile's ``form`` was cut short, or can't be read to its end; ``samples`` is how
    many the decoder expects of each channel.
    """
    if form in ("WAV", "WAVEX"):
        return _wav(content)
    if form == "OGG":
        return _ogg(content)
    if form == "MP3":
        return _mp3(content, samples)
    return None


def _wav(content: bytes) -> str | None:
    place = 12  # behind RIFF, its size, WAVE
    while place + 8 <= len(content):
        size = struct.unpack_from("<I", content, place + 4)[0]
        if content[place : place + 4] == b"data":
            there = len(content) - place - 8
            if there < size < _STREAMED:
                return f"is cut short: {there} of {size} bytes of sound are there"
            return None
        place += 8 + size + size % 2
    return None


def _ogg(content: bytes) -> str | None:
    place = content.rfind(b"OggS")
    segments = content[place + 26] if len(content) > place + 26 else 0
    table = content[place + 27 : place + 27 + segments]
    if len(content) < place + 27 + segments + sum(table) or not segments:
        return "is cut short: its last page is not whole"
    return None


def _mp3(content: bytes, samples: int) -> str | None:
    """libsndfile takes the length from a tag of the first frame, else guesses it, and reads no further."""
    counted = _mp3_samples(content)
    if abs(counted - samples) > 0.02 * counted + 8 * 1152:
        return f"its frames hold {counted} samples and its header tells of {samples}: cut short, or without a length"
    return None


def _mp3_samples(content: bytes) -> int:
    """Samples of each channel in the Layer III frames from the first one on."""
    place = 0
    if content[:3] == b"ID3" and len(content) > 10:
        place = 10 + sum(byte << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=True))
    place, found = max(0, content.find(b"\xff", place)), 0
    while place >= 0 and place + 4 <= len(content):
        frame = _mp3_frame(content, place)
        if frame is None:  # between frames: on to what may be the next
            place = content.find(b"\xff", place + 1)
            continue
        size, samples = frame
        if place + size > len(content):
            break
        found += samples
        place += size
    return found


def _mp3_frame(content: bytes, place: int) -> tuple[int, int] | None:
    """Size in bytes and samples of the frame that begins here, if one does."""
    first, second, third = content[place : place + 3]
    version, layer = second >> 3 & 3, second >> 1 & 3
    bitrate, rate = third >> 4, third >> 2 & 3
    if first != 0xFF or second >> 5 != 7 or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return None
    samples = 1152 if version == 3 else 576
    kilobits = _BITRATES[1 if version == 3 else 2][bitrate]
    return samples // 8 * kilobits * 1000 // _RATES[version][rate] + (third >> 1 & 1), samples
