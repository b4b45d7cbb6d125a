"""Pictures, clips and recordings from files: what is turned, transparent, deep or long, and what is refused."""

import cv2
import numpy as np
import pytest
from PIL import Image

from mmcompress.media import load_audio, load_image, load_video


def test_a_picture_is_turned_upright(tmp_path):
    picture = Image.new("RGB", (20, 10), "white")
    picture.putpixel((0, 0), (0, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (10, 20) and upright.getpixel((9, 0)) == (0, 0, 0)


def test_what_is_transparent_shows_white(tmp_path):
    Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255]]], dtype="uint8"), "RGBA").save(tmp_path / "text.png")
    shown = load_image(tmp_path / "text.png")
    assert shown.mode == "RGB" and [shown.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (0,) * 3]


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype="uint16")).save(tmp_path / "deep.png")
    deep = load_image(tmp_path / "deep.png")
    assert [deep.getpixel((x, 0)) for x in range(4)] == [(v,) * 3 for v in (0, 1, 128, 255)]
    Image.fromarray(np.array([[0.0, 0.5]], dtype="float32")).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="image must be a picture"):
        load_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_malformed_exif_is_no_reason_to_refuse(tmp_path, kind):
    """Every viewer shows it; where the orientation can be read it holds, whatever stands beside it."""
    exif = b"\x00\x08\x00\x02\x01\x12\x00\x03"
    Image.new("RGB", (32, 16), "red").save(tmp_path / f"a.{kind}", exif=exif)
    shown = load_image(tmp_path / f"a.{kind}")
    assert shown.size == (32, 16) and shown.getpixel((0, 0))[0] >= 254
    turned = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0\0\0\0\0"
    Image.new("RGB", (32, 16), "red").save(tmp_path / f"b.{kind}", exif=turned)
    assert load_image(tmp_path / f"b.{kind}").size == (16, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path, orientation):
    pixels = np.arange(2 * 3 * 3, dtype="uint8").reshape(2, 3, 3)
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=picture.getexif())
    rows, columns = pixels, pixels.transpose(1, 0, 2)  # TIFF 6.0: where row 0 and column 0 of the file lie when it is viewed
    wanted = [rows, rows[:, ::-1], rows[::-1, ::-1], rows[::-1], columns, columns[:, ::-1], columns[::-1, ::-1], columns[::-1]]
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), wanted[orientation - 1])


def test_a_cut_off_picture_is_refused_whatever_its_exif(tmp_path):
    exif = b"\x00\x08\x00\x02\x01\x12\x00\x03"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype="uint8")
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="image must be a picture that Pillow can read"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(("dtype", "mode"), [("int32", "I"), ("float32", "F")])
def test_32_bits_are_refused_by_name(tmp_path, dtype, mode):
    Image.fromarray(np.arange(256).reshape(16, 16).astype(dtype)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=rf"image must be a picture of 8 or 16 bits a channel, got 32 \(mode {mode}\)"):
        load_image(tmp_path / "deep.tiff")


def test_16_bits_of_every_format(tmp_path):
    values = np.arange(256).reshape(16, 16)
    for name, dtype in {"a.png": "<u2", "a.tiff": "<u2", "b.tiff": ">u2"}.items():
        Image.fromarray((257 * values).astype(dtype)).save(tmp_path / name)
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + (257 * values).astype(">u2").tobytes())
    for name in ("a.png", "a.tiff", "b.tiff", "a.pgm"):
        assert np.array_equal(np.asarray(load_image(tmp_path / name))[..., 1], values), name


def test_colours_of_every_mode(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    pictures = {
        "cmyk.tiff": (Image.new("CMYK", (2, 1), (0, 255, 255, 0)), {}, [(255, 0, 0)] * 2),
        "palette.png": (palette, {}, [(255, 0, 0), (0, 0, 255)]),
        "clear.gif": (palette, {"transparency": 0}, [(255, 255, 255), (0, 0, 255)]),
        "one_bit.png": (Image.new("1", (2, 1), 1), {}, [(255, 255, 255)] * 2),
        "grey_alpha.png": (Image.new("LA", (2, 1), (0, 0)), {}, [(255, 255, 255)] * 2),
    }
    for name, (picture, options, wanted) in pictures.items():
        picture.save(tmp_path / name, **options)
        shown = load_image(tmp_path / name)
        assert [shown.getpixel((x, 0)) for x in (0, 1)] == wanted, name


@pytest.mark.parametrize(("length", "wanted"), [(1, [0]), (3, [0, 1, 2]), (40, [5, 15, 25, 35])])
def test_frames_are_those_of_their_numbers(tmp_path, length, wanted):
    path = str(tmp_path / "clip.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 32))
    for i in range(length):
        writer.write(np.full((32, 32, 3), 6 * i, dtype="uint8"))
    writer.release()
    frames, numbers, fps = load_video(path, num_frames=4)
    assert numbers == wanted and fps == 10 and frames.shape == (len(wanted), 32, 32, 3)
    assert np.abs(frames.mean((1, 2, 3)) - 6 * np.array(wanted)).max() < 2


@pytest.mark.parametrize("num_frames", [0, -1, True, 2.0])
def test_no_frames_are_refused(tmp_path, num_frames):
    with pytest.raises(ValueError, match="num_frames must be an integer >= 1, got"):
        load_video(tmp_path / "clip.avi", num_frames)


def test_a_picture_is_no_clip(tmp_path):
    """OpenCV would read those beside it as further frames; an animation is one."""
    pictures = [Image.new("RGB", (20, 20), (80 * i, 0, 0)) for i in range(3)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="video must be a clip, got the picture"):
        load_video(tmp_path / "0.png")
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    assert len(load_video(tmp_path / "a.gif")[0]) == 3


def test_a_recording_is_mono_at_the_rate_that_is_asked_for(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    left = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000).astype("float32")
    soundfile.write(tmp_path / "a.wav", np.stack([left, 0 * left], 1), 8000, subtype="FLOAT")
    assert np.array_equal(load_audio(tmp_path / "a.wav", 8000), left / 2)
    wave = load_audio(tmp_path / "a.wav", 16000)
    assert wave.dtype == np.float32 and len(wave) == 16000
    assert np.abs(wave - np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 2)[100:-100].max() < 1e-3
    soundfile.write(tmp_path / "loud.wav", np.full((10, 2), 3e38, "float32"), 16000, subtype="FLOAT")
    assert np.allclose(load_audio(tmp_path / "loud.wav", 16000) / 3e38, 1)


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value, rate):
    soundfile = pytest.importorskip("soundfile")
    wave = np.zeros(1000, "float32")
    wave[7] = value
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    with pytest.raises(ValueError, match="audio must hold finite samples, got NaN or infinity in"):
        load_audio(tmp_path / "a.wav", 16000)


def test_what_is_no_recording(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match="at least one sample"):
        load_audio(tmp_path / "none.wav", 16000)
    (tmp_path / "a.raw").write_bytes(b"1234")
    (tmp_path / "a.wav").write_bytes(b"")
    for name in ("a.raw", "a.wav"):
        with pytest.raises(ValueError, match="audio must be a recording that soundfile can read"):
            load_audio(tmp_path / name, 16000)
