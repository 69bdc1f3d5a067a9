"""ODinW, "object detection in the wild": the 13 and the 35 sets, as GLIP's archives lay them out."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from .coco_format import register_corrected_coco

_SPLIT_FOLDERS = {"train": "train", "val": "valid", "test": "test", "minival": "mini_val"}

_ALL = ("train", "val", "test")
_ALL_AND_MINIVAL = ("train", "val", "test", "minival")

# Set: (folder below odinw/, splits, the split GLIP evaluates on).
# fmt: off
_SETS = {
    "AerialMaritimeDrone_large": ("AerialMaritimeDrone/large", _ALL, "val"),
    "AerialMaritimeDrone_tiled": ("AerialMaritimeDrone/tiled", _ALL, "val"),
    "AmericanSignLanguageLetters": ("AmericanSignLanguageLetters/American Sign Language Letters.v1-v1.coco", _ALL, "val"),
    "Aquarium": ("Aquarium/Aquarium Combined.v2-raw-1024.coco", _ALL, "val"),
    "BCCD": ("BCCD/BCCD.v3-raw.coco", _ALL, "val"),
    "boggleBoards": ("boggleBoards/416x416AutoOrient/export", _ALL, "val"),
    "brackishUnderwater": ("brackishUnderwater/960x540", _ALL_AND_MINIVAL, "minival"),
    "ChessPieces": ("ChessPieces/Chess Pieces.v23-raw.coco", _ALL, "val"),
    "CottontailRabbits": ("CottontailRabbits", _ALL, "val"),
    "dice": ("dice/mediumColor/export", _ALL, "val"),
    "DroneControl": ("DroneControl/Drone Control.v3-raw.coco", _ALL_AND_MINIVAL, "minival"),
    "EgoHands_generic": ("EgoHands/generic", _ALL_AND_MINIVAL, "minival"),
    "EgoHands_specific": ("EgoHands/specific", _ALL_AND_MINIVAL, "minival"),
    "HardHatWorkers": ("HardHatWorkers/raw", _ALL, "val"),
    "MaskWearing": ("MaskWearing/raw", _ALL, "val"),
    "MountainDewCommercial": ("MountainDewCommercial", _ALL, "val"),
    "NorthAmericaMushrooms": ("NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco", _ALL, "val"),
    "openPoetryVision": ("openPoetryVision/512x512", _ALL_AND_MINIVAL, "minival"),
    "OxfordPets_by_breed": ("OxfordPets/by-breed", _ALL_AND_MINIVAL, "minival"),
    "OxfordPets_by_species": ("OxfordPets/by-species", _ALL_AND_MINIVAL, "minival"),
    "Packages": ("Packages/Raw", _ALL, "val"),
    "PascalVOC": ("PascalVOC", ("train", "val"), "val"),
    "pistols": ("pistols/export", _ALL, "val"),
    "PKLot": ("PKLot/640", _ALL_AND_MINIVAL, "minival"),
    "plantdoc": ("plantdoc/416x416", _ALL, "val"),
    "pothole": ("pothole", _ALL, "val"),
    "Raccoon": ("Raccoon/Raccoon.v2-raw.coco", _ALL, "val"),
    "selfdrivingCar": ("selfdrivingCar/fixedLarge/export", _ALL, "val"),
    "ShellfishOpenImages": ("ShellfishOpenImages/raw", _ALL, "val"),
    "ThermalCheetah": ("ThermalCheetah", _ALL, "val"),
    "thermalDogsAndPeople": ("thermalDogsAndPeople", _ALL, "val"),
    "UnoCards": ("UnoCards/raw", _ALL_AND_MINIVAL, "minival"),
    "VehiclesOpenImages": ("VehiclesOpenImages/416x416", _ALL_AND_MINIVAL, "minival"),
    "websiteScreenshots": ("websiteScreenshots", _ALL_AND_MINIVAL, "minival"),
    "WildfireSmoke": ("WildfireSmoke", _ALL, "val"),
}
# fmt: on

_SETS_13 = (
    "AerialMaritimeDrone_large",
    "Aquarium",
    "CottontailRabbits",
    "EgoHands_generic",
    "NorthAmericaMushrooms",
    "Packages",
    "PascalVOC",
    "pistols",
    "pothole",
    "Raccoon",
    "ShellfishOpenImages",
    "thermalDogsAndPeople",
    "VehiclesOpenImages",
)

# What the field calls the classes whose names in the json say little: GLIP's OVERRIDE_CATEGORY for the mushrooms and
# the chess pieces (its category 1 is blank there and keeps its name here), MMDetection's for the rabbits.
_RENAMED_CLASSES = {
    "ChessPieces": {
        2: "black bishop",
        3: "black king",
        4: "black knight",
        5: "black pawn",
        6: "black queen",
        7: "black rook",
        8: "white bishop",
        9: "white king",
        10: "white knight",
        11: "white pawn",
        12: "white queen",
        13: "white rook",
    },
    "CottontailRabbits": {1: "rabbit"},
    "NorthAmericaMushrooms": {1: "flat mushroom", 2: "yellow mushroom"},
}


def _paths(folder: str, split: str) -> tuple[str, str]:
    """The image root and the json of one split, below the folder of all datasets."""
    if folder.endswith("/export"):
        return f"odinw/{folder}", f"odinw/{folder}/{split}_annotations_without_background.json"
    root = f"odinw/{folder}/{_SPLIT_FOLDERS[split]}"
    return root, f"{root}/annotations_without_background.json"


_PREDEFINED_SPLITS_ODINW = {
    f"odinw_{name}_{split}": _paths(folder, split)
    for name, (folder, splits, _) in _SETS.items()
    for split in splits
}

#: The datasets of ODinW-13 and of ODinW-35, each with the split that GLIP evaluates on.
ODINW_13 = tuple(f"odinw_{name}_{_SETS[name][2]}" for name in _SETS_13)
ODINW_35 = tuple(f"odinw_{name}_{split}" for name, (_, _, split) in _SETS.items())


def drop_background(content: dict[str, Any]) -> bool:
    """Removes category 0 where no annotation has it: the exporter's name for the whole set, not a class."""
    categories = content["categories"]
    kept = [category for category in categories if category["id"] != 0]
    if len(kept) == len(categories) or not kept:
        return False
    if any(annotation["category_id"] == 0 for annotation in content.get("annotations", [])):
        return False
    content["categories"] = kept
    return True


def rename_classes(names: dict[int, str], content: dict[str, Any]) -> bool:
    """Gives categories other names.

    Args:
        names: the new names, by category id.
        content: the parsed annotation file, changed in place.
    """
    for category in content["categories"]:
        category["name"] = names.get(category["id"], category["name"])
    return bool(names)


def register_all_odinw(root: str) -> None:
    """Registers ``odinw_<set>_<split>`` for the 35 sets and their splits.

    Args:
        root: the folder of all datasets.
    """
    for dataset_name, (image_root, json_file) in _PREDEFINED_SPLITS_ODINW.items():
        set_name, split = dataset_name[len("odinw_") :].rsplit("_", 1)
        register_corrected_coco(
            dataset_name,
            os.path.join(root, json_file),
            os.path.join(root, image_root),
            split,
            corrections=[
                drop_background,
                partial(rename_classes, _RENAMED_CLASSES.get(set_name, {})),
            ],
        )
