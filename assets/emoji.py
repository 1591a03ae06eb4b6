"""Draws a data set of real pictures in colour: the emoji of a free font, about 1,400 of 32 x 32 pixels.

    apt-get install fonts-noto-color-emoji            # or any other way to install Noto Color Emoji
    python assets/emoji.py                            # writes data/emoji.npz
    python train.py --dataset data/emoji.npz

Takes the emoji that are a single character. The font (https://github.com/googlefonts/noto-emoji) is licensed under the
SIL Open Font License 1.1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from matplotlib.font_manager import findSystemFonts
from PIL import Image, ImageDraw, ImageFont, ImageOps

import utils


def draw_emoji(path: str, size: int) -> np.ndarray:
    """Every emoji of the font on white -> (N, size, size, 3) uint8, in the order of their code points."""
    # The font holds bitmaps of this one size
    font = ImageFont.truetype(path, 109, layout_engine=ImageFont.Layout.BASIC)
    missing = font.getbbox(chr(sys.maxunicode))
    pictures = []
    for character in map(chr, range(0xA0, sys.maxunicode)):
        left, top, right, bottom = box = font.getbbox(character)
        if box == missing:
            continue
        picture = Image.new("RGB", (right - left, bottom - top), "white")
        ImageDraw.Draw(picture).text((-left, -top), character, font=font, embedded_color=True)
        picture = ImageOps.pad(picture, (size, size), Image.Resampling.BOX, color="white")
        if picture.getextrema() != ((255, 255),) * 3:  # a joiner and other signs without a picture
            pictures.append(np.asarray(picture))
    return np.stack(pictures)


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=utils.count, default=32, help="width and height of the pictures")
    parser.add_argument("--out", type=Path, default=Path("data/emoji.npz"), help="the file to write")
    args = parser.parse_args()
    fonts = [path for path in findSystemFonts() if "NotoColorEmoji" in path]
    if not fonts:
        raise utils.UserError("the font Noto Color Emoji is not installed: apt-get install fonts-noto-color-emoji")
    images = draw_emoji(fonts[0], args.size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, images=images)
    print(f"wrote {args.out}: {len(images):,} emoji")


if __name__ == "__main__":
    main()
