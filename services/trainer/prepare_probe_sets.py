"""Make the labelled probe sets in `synthrep_trainer/probe_sets/` from openly licensed packages.

Run once by a maintainer; the results are committed. Fetch the packages into one folder first:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    apt-get download openclipart-png dataset-fashion-mnist        # Debian 12
    python services/trainer/prepare_probe_sets.py --packages FOLDER

Every package is checked against its SHA-256. Near-duplicates are dropped over the whole set and
drawings of one emoji stay on one side, so that no test image has a twin in train. Equal inputs and
library versions give equal archives: seeds are fixed and no time enters a tar.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import logging
import lzma
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

logger = logging.getLogger("prepare_probe_sets")

SIDE_PX = 32
SUPERSAMPLE_PX = 256  # huge drawings are reduced to this before they are cut out
# Relative distance below which two 16 px reductions count as the same picture; set by looking at
# pairs: below 0.2 they are colour or gender variants of one drawing, above 0.25 different things.
NEAR_DUPLICATE = 0.2
SEED = 0

PACKAGES = {  # file name -> SHA-256
    "emoji-datasource-google-16.0.0.tgz": (
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
    ),
    "emoji-datasource-twitter-16.0.0.tgz": (
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
    ),
    "openclipart-png_1%3a0.18+dfsg-19_all.deb": (
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"
    ),
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb": (
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
    ),
}
CLIPART_FOLDERS = ("animals", "food", "office", "people", "recreation", "transportation")
CLIPART_FLAGS = "signs_and_symbols/flags"
# Playing cards and road signs: hundreds of pictures that differ in one glyph.
CLIPART_SKIPPED = (
    "recreation/games/cards",
    "transportation/aiga-symbols",
    "transportation/roadsigns",
)
FASHION_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


@dataclass(frozen=True)
class Drawing:
    """One labelled picture; drawings of equal `group` never part between train and test."""

    image: Image.Image
    label: str
    group: str


def main() -> None:
    """Check the packages, then write every set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packages")
    default = Path(__file__).parent / "synthrep_trainer" / "probe_sets"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    packages, out = arguments.packages, arguments.out
    for name, digest in PACKAGES.items():
        found = hashlib.sha256((packages / name).read_bytes()).hexdigest()
        if found != digest:
            raise SystemExit(f"{name}: expected SHA-256 {digest}, found {found}")
    emoji = without_near_duplicates(emoji_drawings(packages))
    write_set(out / "emoji", *split_by_group(emoji, test_share=0.5), encode=webp)
    clipart = without_near_duplicates(clipart_drawings(packages))
    write_set(out / "clipart", *split_by_group(clipart, test_share=0.58), encode=webp)
    write_set(out / "fashion", *fashion_drawings(packages), encode=grey_png)
    digits = list(digit_drawings())
    write_set(out / "digits", *split_by_group(digits, test_share=0.558), encode=grey_png)


def emoji_drawings(packages: Path) -> Iterator[Drawing]:
    """Two drawings (Noto, Twemoji) of each emoji, labelled with its category."""
    for vendor in ("google", "twitter"):
        with tarfile.open(packages / f"emoji-datasource-{vendor}-16.0.0.tgz") as archive:
            rows = json.loads(member_bytes(archive, "package/emoji.json"))
            for row in rows:
                if row["category"] == "Component" or not row[f"has_img_{vendor}"]:
                    continue
                data = member_bytes(archive, f"package/img/{vendor}/64/{row['image']}")
                yield Drawing(cut_out(data), row["category"], row["unified"])


def clipart_drawings(packages: Path) -> Iterator[Drawing]:
    """Open Clip Art drawings, labelled with the folder that their editors put them in."""
    root = "./usr/share/openclipart/png/"
    with debian_archive(packages / "openclipart-png_1%3a0.18+dfsg-19_all.deb") as archive:
        members = {m.name.removeprefix(root): m for m in archive if m.name.endswith(".png")}
        for name in sorted(members):
            folder = name.split("/")[0]
            label = "flags" if name.startswith(CLIPART_FLAGS) else folder
            is_wanted = label == "flags" or folder in CLIPART_FOLDERS
            if is_wanted and members[name].isreg() and not name.startswith(CLIPART_SKIPPED):
                yield Drawing(cut_out(member_bytes(archive, members[name])), label, name)


def fashion_drawings(packages: Path) -> tuple[list[Drawing], list[Drawing]]:
    """1,000 and 1,500 images of the official train and test parts of Fashion-MNIST."""
    root = "./usr/share/datasets/fashion-mnist/"
    rng = np.random.default_rng(SEED)
    parts = []
    deb = packages / "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb"
    with debian_archive(deb) as archive:
        for part, per_class in (("train", 100), ("t10k", 150)):
            images = gzip.decompress(member_bytes(archive, f"{root}{part}-images-idx3-ubyte.gz"))
            labels = gzip.decompress(member_bytes(archive, f"{root}{part}-labels-idx1-ubyte.gz"))
            pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
            classes = np.frombuffer(labels, np.uint8, offset=8)
            of_class = [np.flatnonzero(classes == c) for c in range(len(FASHION_CLASSES))]
            rows = np.concatenate([rng.choice(i, per_class, replace=False) for i in of_class])
            parts.append(
                [Drawing(Image.fromarray(pixels[i]), FASHION_CLASSES[classes[i]], "") for i in rows]
            )
    return parts[0], parts[1]


def digit_drawings() -> Iterator[Drawing]:
    """The 1,797 handwritten digits of scikit-learn, 8 px, 17 grey levels spread over 0-255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        grey = np.round(image * (255 / 16)).astype(np.uint8)
        yield Drawing(Image.fromarray(grey), str(label), str(index))


def debian_archive(path: Path) -> tarfile.TarFile:
    """The file tree of a .deb, read into memory."""
    tree = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, capture_output=True)
    return tarfile.open(fileobj=io.BytesIO(tree.stdout))


def member_bytes(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    """The bytes of one regular member; raises KeyError if it is absent or no file."""
    stream = archive.extractfile(member)
    if stream is None:
        raise KeyError(f"{member} is not a file")
    return stream.read()


def cut_out(data: bytes) -> Image.Image:
    """The drawing without its transparent margin, centred on a white square of SIDE_PX."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image.thumbnail((SUPERSAMPLE_PX, SUPERSAMPLE_PX))
    image = image.crop(image.getchannel("A").getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)


def without_near_duplicates(drawings: Iterable[Drawing]) -> list[Drawing]:
    """Keep, in order, each drawing that differs by NEAR_DUPLICATE or more from all kept ones.

    The measure is |a - b| / sqrt(|a|^2 + |b|^2) over the ink (255 - pixel) at half size.
    """
    pool = list(drawings)
    ink = 255 - np.stack([np.asarray(d.image.reduce(2), np.float32).ravel() for d in pool])
    energy = (ink**2).sum(1)
    total = energy[:, None] + energy[None] + 1  # two blank squares are equal, not undefined
    is_near = total - 1 - 2 * (ink @ ink.T) < NEAR_DUPLICATE**2 * total
    kept: list[int] = []
    for index in range(len(pool)):
        if not is_near[index, kept].any():
            kept.append(index)
    logger.info("kept %d of %d drawings", len(kept), len(pool))
    return [pool[index] for index in kept]


def split_by_group(
    drawings: Sequence[Drawing], *, test_share: float
) -> tuple[list[Drawing], list[Drawing]]:
    """(train, test): about `test_share` of the groups of each label, drawn with SEED, are test."""
    rng = np.random.default_rng(SEED)
    test_groups: set[str] = set()
    for label in sorted({d.label for d in drawings}):
        groups = rng.permutation(sorted({d.group for d in drawings if d.label == label}))
        test_groups.update(groups[: round(test_share * len(groups))].tolist())
    train = [d for d in drawings if d.group not in test_groups]
    return train, [d for d in drawings if d.group in test_groups]


def webp(image: Image.Image) -> tuple[str, bytes]:
    """(suffix, bytes) of a colour image as WebP of quality 90."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=90, method=6)
    return "webp", stream.getvalue()


def grey_png(image: Image.Image) -> tuple[str, bytes]:
    """(suffix, bytes) of a grey image without loss; stored, because xz packs it better."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=0)
    return "png", stream.getvalue()


def write_set(
    folder: Path,
    train: Sequence[Drawing],
    test: Sequence[Drawing],
    *,
    encode: Callable[[Image.Image], tuple[str, bytes]],
) -> None:
    """Write train.tar.xz, test.tar.xz and classes.txt of one set."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = sorted({d.label for d in train})
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for split, drawings in (("train", train), ("test", test)):
        stream = io.BytesIO()
        order = np.random.default_rng(SEED).permutation(len(drawings))
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for key, index in enumerate(order):
                suffix, data = encode(drawings[index].image)
                label = str(classes.index(drawings[index].label)).encode()
                for name, content in ((f"{key:05d}.{suffix}", data), (f"{key:05d}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        packed = lzma.compress(stream.getvalue(), preset=9 | lzma.PRESET_EXTREME)
        (folder / f"{split}.tar.xz").write_bytes(packed)
        logger.info("%s/%s: %d images, %d bytes", folder.name, split, len(drawings), len(packed))


if __name__ == "__main__":
    main()
