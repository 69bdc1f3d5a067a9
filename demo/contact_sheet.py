"""Puts the demo's photos on one sheet, on which everything is small, with their boxes.

python demo/contact_sheet.py --output output/sheet

Writes sheet.png and boxes.json, which suits --proposals.
"""

from __future__ import annotations

import json
from pathlib import Path

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/sheet"))
    return parser


if __name__ == "__main__":
    begin(argument_parser())

from photos import photo_paths
from PIL import Image, ImageOps

COLUMNS = 3
# Of a photo's place on the sheet: width and height in pixels.
CELL = (300, 240)
BOXES = Path(__file__).with_name("boxes.json")


def contact_sheet(paths: list[Path]) -> tuple[Image.Image, list[list[float]]]:
    """Returns the sheet and the boxes of its photos: XYXY, pixels of the sheet."""
    known = json.loads(BOXES.read_text())
    rows = -(-len(paths) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL[0], rows * CELL[1]), "white")
    boxes = []
    for place, path in enumerate(paths):
        photo = Image.open(path).convert("RGB")
        width = photo.width
        photo = ImageOps.contain(photo, CELL)
        x = place % COLUMNS * CELL[0] + (CELL[0] - photo.width) // 2
        y = place // COLUMNS * CELL[1] + (CELL[1] - photo.height) // 2
        sheet.paste(photo, (x, y))
        scale = photo.width / width
        for box in known[path.name]["boxes"]:
            boxes.append([round(start + scale * side, 1) for start, side in zip([x, y] * 2, box)])
    return sheet, boxes


def main() -> None:
    args = argument_parser().parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sheet, boxes = contact_sheet(photo_paths())
    sheet.save(args.output / "sheet.png")
    (args.output / "boxes.json").write_text(json.dumps({"sheet.png": {"boxes": boxes}}))
    print(f"In {args.output}: sheet.png and boxes.json.")


if __name__ == "__main__":
    main()
