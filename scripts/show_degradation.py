"""Write a page of pictures as restoration training degrades them.

python scripts/show_degradation.py PICTURE... [--out runs/degradation.html] [--scale 1|2|4] [--size 256] [--sharpened]
"""

import argparse
import sys
from pathlib import Path

from llmga.config import EXIT_BAD_INPUT
from llmga.diffrir.gallery import write_gallery
from llmga.diffrir.reference import SCALES, InputError
from llmga.images import PictureError


def main() -> None:
    """Read the arguments, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("--out", type=Path, default=Path("runs/degradation.html"))
    parser.add_argument("--scale", type=int, choices=SCALES, default=1)
    parser.add_argument("--size", type=int, default=256, help="side of the clean pictures in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sharpened", action="store_true", help="sharpen the targets, as the V2 runs do")
    args = parser.parse_args()
    try:
        write_gallery(
            args.out, args.pictures, scale=args.scale, size=args.size, seed=args.seed, sharpened=args.sharpened
        )
    except (PictureError, InputError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    print(f"open {args.out}")


if __name__ == "__main__":
    main()
