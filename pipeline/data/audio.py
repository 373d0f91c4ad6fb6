"""Speech from bytes to float32 at 16 kHz.

In: the bytes of a FLAC or WAV file. Out: ``(samples,)`` float32. Both decoders work without the interpreter's lock:
miniaudio for mono FLAC, which is nearly all that training reads and takes it half of libFLAC's time, and soundfile for
the rest; the bits are the same. torchaudio's own loader would need FFmpeg.
"""

from __future__ import annotations

import io

import numpy as np
import soundfile

try:
    from _miniaudio import ffi, lib  # below its Python layer, which copies what it has decoded
except ImportError:  # no wheel for this machine: soundfile gives the same bits later
    lib = None

_INT16_SCALE = np.float32(1 / 32768)
_BLOCK = 1024


class DecodeError(ValueError):
    """A file whose content can't be turned into a tensor; the message is the reason without the file's name."""


def decode_audio(
    content: bytes, start: int = 0, samples: int | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Decode ``samples`` audio samples from ``start`` on, or all: float32 ``(samples,)`` in [-1, 1], channels averaged.

    They are written into ``out``, contiguous float32 ``(samples,)``, if it is given. What lies before ``start`` is
    passed over without decoding where the format allows it.

    Raises :class:`DecodeError` if the file is no audio or ends early.
    """
    if lib is not None and content[:4] == b"fLaC":
        waveform = _decode_flac(content, start, samples, out)
        if waveform is not None:
            return waveform
    waveform = _decode_by_soundfile(content, start, samples)
    if out is None:
        return waveform
    out[:] = waveform
    return out


def _decode_by_soundfile(content: bytes, start: int, samples: int | None) -> np.ndarray:
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            wanted = file.frames - start if samples is None else samples
            if start:
                file.seek(start)
            # libsndfile turns 16-bit WAV into float32 slower than NumPy does.
            dtype = "int16" if (file.format, file.subtype) == ("WAV", "PCM_16") else "float32"
            waveform = file.read(wanted, dtype=dtype, always_2d=True)  # (samples, channels)
    except soundfile.LibsndfileError as error:
        # Its own text, for str(error) has the address of the buffer in it, and reasons must be repeatable.
        raise DecodeError(f"not decodable as audio: {error.error_string}") from error
    except (MemoryError, ValueError) as error:  # NumPy can't make an array of that size
        raise DecodeError(f"not decodable as audio: its header says {wanted} audio samples") from error
    if len(waveform) != wanted:
        raise DecodeError(f"ends after {start + len(waveform)} of {start + wanted} audio samples")
    if waveform.dtype == np.int16:
        waveform = waveform * _INT16_SCALE
    elif not np.isfinite(np.add.reduce(waveform, axis=None)):  # a file of floating point numbers may hold anything
        raise DecodeError("holds values that are not numbers, or too large ones")
    return waveform[:, 0] if waveform.shape[1] == 1 else waveform.mean(axis=1)


def _decode_flac(content: bytes, start: int, samples: int | None, out: np.ndarray | None) -> np.ndarray | None:
    """What :func:`decode_audio` gives for a mono FLAC file; None for all that miniaudio can't read to the end, which
    soundfile then reads or says why not.
    """
    decoder = lib.ma_dr_flac_open_memory(ffi.from_buffer(content), len(content), ffi.NULL)
    if decoder == ffi.NULL:
        return None
    try:
        wanted = decoder.totalPCMFrameCount - start if samples is None else samples
        if decoder.channels != 1 or not 0 < wanted <= len(content) * _BLOCK:
            return None  # the bound keeps a broken header from asking for all memory
        waveform = np.empty(wanted, dtype=np.float32) if out is None else out
        if start and not lib.ma_dr_flac_seek_to_pcm_frame(decoder, start):
            return None
        # A frame with a wrong checksum is left out, so a damaged file comes short.
        if lib.ma_dr_flac_read_pcm_frames_f32(decoder, wanted, ffi.from_buffer("float[]", waveform)) != wanted:
            return None
        return waveform
    finally:
        lib.ma_dr_flac_close(decoder)


def normalise(waveform: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the clip, as wav2vec 2.0's large models are fed."""
    return normalise_(waveform.copy())


def normalise_(waveform: np.ndarray) -> np.ndarray:
    """:func:`normalise` in place, for contiguous float32."""
    waveform -= np.add.reduce(waveform) / np.float32(len(waveform))
    # Blocks are summed in float32 and the sums in float64, so nothing is rounded away; einsum reads the samples once,
    # and adds them in the same order on every machine.
    whole = len(waveform) - len(waveform) % _BLOCK
    blocks, rest = waveform[:whole].reshape(-1, _BLOCK), waveform[whole:]  # (blocks, _BLOCK), (less than a block,)
    power = np.einsum("ij,ij->i", blocks, blocks).sum(dtype=np.float64) + np.einsum("i,i->", rest, rest)
    waveform *= np.float32((power / len(waveform) + 1e-5) ** -0.5)
    return waveform
