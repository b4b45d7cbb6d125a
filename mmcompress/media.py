"""Pictures, clips and recordings from files. A file that is missing or broken is an OSError or ValueError of one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def load_image(path: str | Path) -> Image.Image:
    """The picture in RGB, turned upright as its EXIF orientation says; what is transparent shows white, 16 bits become 8. Of
    several pictures in a file the first.

    Raises FileNotFoundError or, for what is no picture of 8 or 16 bits a channel, ValueError.
    """
    from PIL import Image

    _existing(path, "image")
    try:
        with Image.open(path) as image:
            image.load()
            mode = image.mode
            picture = None if _is_deep(image) else _rgb(_upright(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"image has too many pixels to be safe, got {str(path)!r}") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for some broken PNG files
        if getattr(error, "strerror", None):  # no right to read it
            raise
        raise ValueError(f"image must be a picture that Pillow can read, got {str(path)!r}") from error
    if picture is None:
        raise ValueError(f"image must be a picture of 8 or 16 bits a channel, got 32 (mode {mode}) in {str(path)!r}")
    return picture


def _is_deep(image: Image.Image) -> bool:
    """Whether a channel has 32 bits: what is white in them, 1, 255, 65535 or something measured, is not said. Pillow reads the
    16 bits of PGM (and earlier of PNG) files into them, stretched to 65535."""
    return image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM"))


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # malformed EXIF: every viewer shows the picture as it lies; Pillow raises what it comes across
        return image
    bare = image.copy()
    bare.info = {k: v for k, v in image.info.items() if k == "transparency"}
    bare.getexif()[_ORIENTATION] = orientation  # alone: what else stands there may be what cannot be written again
    return ImageOps.exif_transpose(bare) if orientation in range(2, 9) else image


_ORIENTATION = 0x0112


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow would cut off what is above 255
        import numpy as np

        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype("uint8"))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def load_video(path: str | Path, num_frames: int = 8) -> tuple[np.ndarray, list[int], float]:
    """At most `num_frames` evenly spaced frames [T, H, W, 3] in RGB, their numbers in the clip, and its frames per second.

    Raises FileNotFoundError, or ValueError for what is no clip (a picture is none) and for num_frames below 1.
    """
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames must be an integer >= 1, got {num_frames!r}")
    _existing(path, "video")
    try:
        import cv2
    except ImportError as error:
        raise ImportError("reading a video needs OpenCV: pip install 'mmcompress[video]'") from error
    import math

    import numpy as np

    if _is_picture(path):
        raise ValueError(f"video must be a clip, got the picture {str(path)!r}: that is an image")
    capture = cv2.VideoCapture(str(path))
    total = 0
    while capture.grab():  # the frame count of a header is not to be trusted: count what can be decoded
        total += 1
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    capture.release()
    wrong = ValueError(f"video must be a clip that OpenCV can read, got {str(path)!r}")
    if not total:
        raise wrong
    n = min(num_frames, total)
    numbers = [(2 * i + 1) * total // (2 * n) for i in range(n)]
    wanted = set(numbers)
    capture = cv2.VideoCapture(str(path))
    frames: list[np.ndarray] = []
    for i in range(numbers[-1] + 1):  # a clip in memory would take gigabytes a minute
        capture.grab()
        if i in wanted:
            good, frame = capture.retrieve()
            if not good or (frames and frame.shape != frames[0].shape):
                raise wrong
            frames.append(frame[..., ::-1])
    capture.release()
    return np.stack(frames), numbers, fps if math.isfinite(fps) and fps > 0 else 24.0


def _is_picture(path: str | Path) -> bool:
    """OpenCV takes a still picture for a clip, and with it those beside it whose names count on."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return not getattr(image, "is_animated", False)
    except Exception:  # not for Pillow, whatever it says of it
        return False


def load_audio(path: str | Path, sampling_rate: int) -> np.ndarray:
    """The recording as mono float32 [samples] at `sampling_rate` Hz.

    Raises FileNotFoundError, or ValueError for what is no recording, is empty, or holds samples that are no numbers.
    """
    _existing(path, "audio")
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("reading a recording needs soundfile: pip install 'mmcompress[audio]'") from error
    import numpy as np

    try:
        wave, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:  # TypeError: a file of raw samples says no rate
        raise ValueError(f"audio must be a recording that soundfile can read, got {str(path)!r}") from error
    if not len(wave):
        raise ValueError(f"audio must hold at least one sample, got {str(path)!r}")
    wave = wave.mean(1, dtype="float64").astype("float32")  # the sum of two channels may be beyond float32
    if rate != sampling_rate:
        wave = _resample(wave, rate, sampling_rate)
    if not np.isfinite(wave).all():
        raise ValueError(f"audio must hold finite samples, got NaN or infinity in {str(path)!r}")
    return wave


def _resample(wave: Any, rate: int, target: int) -> Any:
    try:
        from torchaudio.functional import resample
    except ImportError as error:
        raise ImportError(
            f"a recording at {rate} Hz for a model that hears {target} Hz needs torchaudio: pip install 'mmcompress[audio]'"
        ) from error
    import torch

    return resample(torch.from_numpy(wave), rate, target).numpy()


def _existing(path: str | Path, name: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} must be an existing file, got {str(path)!r}")
