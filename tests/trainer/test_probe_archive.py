"""Reading a split: what comes out, and what is refused before it can do harm."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from synthrep_trainer import probe_archive
from synthrep_trainer.probe_archive import read_batches
from synthrep_trainer.probe_data import ProbeDataError


def encoded(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def tar_bytes(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)


@pytest.fixture
def good(noise):
    """Members of three whole samples."""
    members = []
    for index in range(3):
        members += [(f"k{index}.png", encoded(noise[index])), (f"k{index}.cls", b"%d\n" % index)]
    return members


@pytest.fixture
def write(tmp_path):
    def write(members, name="train.tar"):
        path = tmp_path / name
        path.write_bytes(tar_bytes(members))
        return path

    return write


def read(path, image_px=8, **options):
    batches = list(read_batches(path, image_px=image_px, **options))
    images = np.concatenate([batch.images for batch in batches])
    return images, np.concatenate([batch.labels for batch in batches])


def test_images_of_the_asked_size_come_out_unchanged(noise, good, write):
    images, labels = read(write(good))
    np.testing.assert_array_equal(images, noise[:3])
    assert labels.tolist() == [0, 1, 2]
    assert labels.dtype == np.int64


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_packed_archives_read_like_plain_ones(noise, good, tmp_path, suffix, pack):
    path = tmp_path / f"train.tar{suffix}"
    path.write_bytes(pack(tar_bytes(good)))
    np.testing.assert_array_equal(read(path)[0], noise[:3])


@pytest.mark.parametrize("order", [[0, 2, 4, 1, 3, 5], [5, 3, 1, 4, 2, 0], [1, 0, 3, 2, 5, 4]])
def test_halves_of_a_sample_may_lie_apart(noise, good, write, order):
    images, labels = read(write([good[index] for index in order]))
    np.testing.assert_array_equal(images, noise[labels])


def test_batches_have_the_asked_size_and_a_rest(good, write):
    sizes = [len(b.labels) for b in read_batches(write(good), image_px=8, batch_size=2)]
    assert sizes == [2, 1]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (33, 20), (7, 5), (16, 16)])
def test_resizing_is_short_side_bicubic_and_centre_crop(write, shape):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    image = Image.fromarray(pixels)
    whole = image.resize((shape[1] * 16, shape[0] * 16), Image.Resampling.BICUBIC)
    whole = whole.crop((16 * left, 16 * top, 16 * (left + side), 16 * (top + side)))
    found, _ = read(write([("a.png", encoded(pixels)), ("a.cls", b"0")]), image_px=16 * side)
    assert np.abs(found[0].astype(int) - np.asarray(whole)).max() <= 1


def test_grey_palette_and_transparent_images_become_rgb_on_white(write):
    grey = np.full((8, 8), 90, np.uint8)
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4] = (10, 20, 30, 255)
    palette = io.BytesIO()
    Image.fromarray(grey).convert("P").save(palette, "PNG")
    kinds = {
        "a.png": encoded(grey),
        "b.webp": encoded(clear, "WEBP", lossless=True),
        "c.png": palette.getvalue(),
        "d.JPG": encoded(np.stack([grey] * 3, 2), "JPEG"),
    }
    images, _ = read(write([*kinds.items(), *((f"{name[0]}.cls", b"0") for name in kinds)]))
    assert (images[[0, 2, 3]] == 90).all()
    assert (images[1, :, :4] == (10, 20, 30)).all()
    assert (images[1, :, 4:] == 255).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m[:-1], "k2 has no label"),
        (lambda m: m[1:], "k0 has no image"),
        (lambda m: [*m, ("k0.cls", b"1")], "k0 has more than one label"),
        (lambda m: [*m, m[0]], "k0 has more than one image"),
        (lambda m: [m[0], ("k0.jpg", m[0][1]), *m[1:]], "k0 has more than one image"),
        (lambda m: [m[0], ("k0.cls", b"cat")], "expected one class index"),
        (lambda m: [m[0], ("k0.cls", b"-1")], "expected one class index"),
        (lambda m: [m[0], ("k0.cls", b"1 2")], "expected one class index"),
        (lambda m: [m[0], ("k0.cls", b"")], "expected one class index"),
        (lambda m: [*m, ("k3.pickle", b"")], "neither an image nor a .cls"),
        (lambda m: [*m, ("README", b"")], "unexpected member"),
        (lambda m: [("../k.png", m[0][1]), ("../k.cls", b"0")], "unexpected member"),
        (lambda m: [("/etc/k.png", m[0][1]), ("/etc/k.cls", b"0")], "unexpected member"),
        (lambda m: [("k0.png", b"no image"), m[1]], "k0: the image cannot be decoded"),
        (lambda m: [("k0.png", m[0][1][:60]), m[1]], "k0: the image cannot be decoded"),
        (lambda m: [("k0.png", b""), m[1]], "k0: the image cannot be decoded"),
        (lambda m: [("k0.png", png_header(50_000, 50_000)), m[1]], "k0: .*decompression bomb"),
        (lambda m: [("k0.png", png_header(10_000, 10_000)), m[1]], "k0: .*decompression bomb"),
        (lambda m: [("k0.png", png_header(8_000, 8_000)), m[1]], "k0: 8000 x 8000 pixels"),
        (lambda m: [], "holds no labelled image"),
    ],
)
def test_a_bad_member_is_refused_by_name(good, write, change, words):
    with pytest.raises(ProbeDataError, match=f"train.tar: .*{words}|train.tar: {words}"):
        read(write(change(good)))


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_a_name_need_not_tell_the_format(write, kind):
    pixels = np.full((8, 8, 3), 51, np.uint8)
    images, _ = read(write([("k.jpg", encoded(pixels, kind)), ("k.cls", b"0")]))
    np.testing.assert_array_equal(images[0], pixels)


def test_other_image_formats_are_not_decoded(noise, write):
    with pytest.raises(ProbeDataError, match="cannot be decoded"):
        read(write([("k.png", encoded(noise[0], "TIFF")), ("k.cls", b"0")]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        member = tarfile.TarInfo("k.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ProbeDataError, match="unexpected member"):
        read(tmp_path / "train.tar")


def test_folders_in_the_archive_are_passed_over(noise, good, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        folder = tarfile.TarInfo("./part")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in good:
            member = tarfile.TarInfo(f"./part/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    np.testing.assert_array_equal(read(tmp_path / "train.tar")[0], noise[:3])


def test_an_archive_cut_between_two_samples_is_noticed(good, tmp_path):
    whole = tar_bytes(good)
    one_sample = len(tar_bytes(good[:2]).rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "train.tar").write_bytes(whole[:one_sample])
    with pytest.raises(ProbeDataError, match="cut short"):
        read(tmp_path / "train.tar")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_an_archive_cut_anywhere_is_refused(good, tmp_path, suffix, share):
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    data = pack(tar_bytes(good).rstrip(b"\0") if suffix == "" else tar_bytes(good))
    path = tmp_path / f"train.tar{suffix}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ProbeDataError, match="train.tar"):
        read(path)


@pytest.mark.parametrize("rest", [b"x", bytes(33 * 2**20)])
def test_nothing_may_follow_the_end_of_the_archive(good, tmp_path, rest):
    (tmp_path / "train.tar").write_bytes(tar_bytes(good) + rest)
    with pytest.raises(ProbeDataError, match="something follows"):
        read(tmp_path / "train.tar")


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_flipped_bit_in_a_packed_archive_is_refused(good, tmp_path, suffix, pack):
    data = bytearray(pack(tar_bytes(good)))
    data[-6] ^= 1
    (tmp_path / f"train.tar{suffix}").write_bytes(data)
    with pytest.raises(ProbeDataError, match="cannot be read"):
        read(tmp_path / f"train.tar{suffix}")


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(ProbeDataError, match=r"train.tar: the archive cannot be read"):
        read(tmp_path / "train.tar")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_member_that_claims_gigabytes_is_not_read(tmp_path, kind):
    member = tarfile.TarInfo("k.png")
    member.type, member.size = kind, 2**32
    packed = lzma.compress(member.tobuf() + bytes(64 * 2**20), preset=0)
    (tmp_path / "train.tar.xz").write_bytes(packed)
    with pytest.raises(ProbeDataError, match="at most 33554432"):
        read(tmp_path / "train.tar.xz")


def test_a_sparse_member_is_not_blown_up(tmp_path):
    member = tarfile.TarInfo("k.png")
    member.pax_headers = {
        "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "k.png",
        "GNU.sparse.size": str(2**40), "GNU.sparse.map": f"{2**40 - 1},1",
    }  # fmt: skip
    member.size = 1
    with tarfile.open(tmp_path / "train.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(ProbeDataError, match="sparse"):
        read(tmp_path / "train.tar")


def test_images_that_wait_for_their_labels_are_bounded(good, write, monkeypatch):
    apart = [*good[::2], *good[1::2]]
    monkeypatch.setattr(probe_archive, "MAX_WAITING_BYTES", sum(len(d) for _, d in apart[:3]))
    read(write(apart))
    monkeypatch.setattr(probe_archive, "MAX_WAITING_BYTES", len(apart[0][1]))
    read(write(good))
    with pytest.raises(ProbeDataError, match="too far from their .cls"):
        read(write(apart))
