"""ODinW, "object detection in the wild": its 13 and 35 datasets, laid out as in GLIP's archives."""

from __future__ import annotations

import os
from functools import partial
from itertools import product
from typing import Any

from .annotations import register_corrected_coco

# The folder of each dataset below odinw/.
_FOLDERS = {
    "AerialMaritimeDrone_large": "AerialMaritimeDrone/large",
    "AerialMaritimeDrone_tiled": "AerialMaritimeDrone/tiled",
    "AmericanSignLanguageLetters": (
        "AmericanSignLanguageLetters/American Sign Language Letters.v1-v1.coco"
    ),
    "Aquarium": "Aquarium/Aquarium Combined.v2-raw-1024.coco",
    "BCCD": "BCCD/BCCD.v3-raw.coco",
    "boggleBoards": "boggleBoards/416x416AutoOrient/export",
    "brackishUnderwater": "brackishUnderwater/960x540",
    "ChessPieces": "ChessPieces/Chess Pieces.v23-raw.coco",
    "CottontailRabbits": "CottontailRabbits",
    "dice": "dice/mediumColor/export",
    "DroneControl": "DroneControl/Drone Control.v3-raw.coco",
    "EgoHands_generic": "EgoHands/generic",
    "EgoHands_specific": "EgoHands/specific",
    "HardHatWorkers": "HardHatWorkers/raw",
    "MaskWearing": "MaskWearing/raw",
    "MountainDewCommercial": "MountainDewCommercial",
    "NorthAmericaMushrooms": "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco",
    "openPoetryVision": "openPoetryVision/512x512",
    "OxfordPets_by_breed": "OxfordPets/by-breed",
    "OxfordPets_by_species": "OxfordPets/by-species",
    "Packages": "Packages/Raw",
    "PascalVOC": "PascalVOC",
    "pistols": "pistols/export",
    "PKLot": "PKLot/640",
    "plantdoc": "plantdoc/416x416",
    "pothole": "pothole",
    "Raccoon": "Raccoon/Raccoon.v2-raw.coco",
    "selfdrivingCar": "selfdrivingCar/fixedLarge/export",
    "ShellfishOpenImages": "ShellfishOpenImages/raw",
    "ThermalCheetah": "ThermalCheetah",
    "thermalDogsAndPeople": "thermalDogsAndPeople",
    "UnoCards": "UnoCards/raw",
    "VehiclesOpenImages": "VehiclesOpenImages/416x416",
    "websiteScreenshots": "websiteScreenshots",
    "WildfireSmoke": "WildfireSmoke",
}

# GLIP evaluates on the small split "minival" of these, on "val" of the others.
_WITH_MINIVAL = """
    brackishUnderwater DroneControl EgoHands_generic EgoHands_specific openPoetryVision
    OxfordPets_by_breed OxfordPets_by_species PKLot UnoCards VehiclesOpenImages websiteScreenshots
""".split()

_SETS_13 = """
    AerialMaritimeDrone_large Aquarium CottontailRabbits EgoHands_generic NorthAmericaMushrooms
    Packages PascalVOC pistols pothole Raccoon ShellfishOpenImages thermalDogsAndPeople
    VehiclesOpenImages
""".split()

# The usual names of classes whose names in the JSON file say little, by category id: GLIP's
# OVERRIDE_CATEGORY for the mushrooms and the chess pieces (category 1 is blank there and keeps its
# name here), MMDetection's for the rabbits.
_PIECES = product(("black", "white"), ("bishop", "king", "knight", "pawn", "queen", "rook"))
_RENAMED_CLASSES = {
    "ChessPieces": {i: " ".join(words) for i, words in enumerate(_PIECES, start=2)},
    "CottontailRabbits": {1: "rabbit"},
    "NorthAmericaMushrooms": {1: "flat mushroom", 2: "yellow mushroom"},
}


def _evaluated(name: str) -> str:
    return f"odinw_{name}_{'minival' if name in _WITH_MINIVAL else 'val'}"


#: The datasets of ODinW-13 and of ODinW-35, each with the split that GLIP evaluates on.
ODINW_13 = tuple(map(_evaluated, _SETS_13))
ODINW_35 = tuple(map(_evaluated, _FOLDERS))


def drop_background(content: dict[str, Any]) -> bool:
    """Removes category 0 unless annotations use it: it is the exporter's name of the dataset."""
    categories = content["categories"]
    kept = [category for category in categories if category["id"] != 0]
    used = any(annotation["category_id"] == 0 for annotation in content.get("annotations", []))
    if used or not kept or len(kept) == len(categories):
        return False
    content["categories"] = kept
    return True


def rename_classes(names: dict[int, str], content: dict[str, Any]) -> bool:
    """Renames the categories whose ids are in ``names``."""
    for category in content["categories"]:
        category["name"] = names.get(category["id"], category["name"])
    return bool(names)


def register_all_odinw(root: str) -> None:
    """Registers ``odinw_<dataset>_<split>`` below the folder of all datasets."""
    for name, folder in _FOLDERS.items():
        splits = {"train": "train", "val": "valid", "test": "test", "minival": "mini_val"}
        if name not in _WITH_MINIVAL:
            del splits["minival"]
        if name == "PascalVOC":
            del splits["test"]
        renamed = partial(rename_classes, _RENAMED_CLASSES.get(name, {}))
        for split, split_folder in splits.items():
            images = os.path.join(root, "odinw", folder)
            json_file = "annotations_without_background.json"
            # In an "export" folder all splits share the images; elsewhere each has a folder.
            if folder.endswith("/export"):
                json_file = f"{split}_{json_file}"
            else:
                images = os.path.join(images, split_folder)
            path, corrections = os.path.join(images, json_file), (drop_background, renamed)
            register_corrected_coco(f"odinw_{name}_{split}", path, images, split, corrections)
