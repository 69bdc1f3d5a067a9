"""The keys RegionSpot adds to Detectron2's config."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode as CN


def add_regionspot_config(cfg: CN) -> None:
    """Adds RegionSpot's keys to ``cfg``, with the values of the paper as defaults."""
    # Detectron2's default is "cuda" everywhere.
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    _add_frozen_models(cfg)
    _add_region_head(cfg)
    _add_naming(cfg)
    _add_search(cfg)
    _add_data(cfg)
    _add_training(cfg)
    _add_evaluation(cfg)


def _add_frozen_models(cfg: CN) -> None:
    # What the frozen models run in: float32, bfloat16, float16, or auto, which is bfloat16 where
    # the device computes in it. Embeddings, scores and texts are float32. In training, float32
    # leaves them to SOLVER.AMP.
    cfg.MODEL.PRECISION = "float32"
    # Whether torch.compile takes the layers of the encoders and of the region head; the first image
    # then takes a minute or two. It needs a C++ compiler.
    cfg.MODEL.COMPILE = False

    # The frozen model that turns regions into mask tokens: a name in LOCALIZER_REGISTRY.
    cfg.MODEL.LOCALIZER = CN()
    cfg.MODEL.LOCALIZER.NAME = "SamLocalizer"
    # Size of the localizer; for SAM: vit_b, vit_l or vit_h. For TransformersSam a name on the
    # Hugging Face hub, or a folder; the weights come with it.
    cfg.MODEL.LOCALIZER.ARCH = "vit_b"
    # A file or a URL; empty means random weights, for tests only.
    cfg.MODEL.LOCALIZER.WEIGHTS = (
        "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"
    )
    # What represents a region: "mask" (SAM's first mask token), "prompt" (its embedding) or "both".
    cfg.MODEL.LOCALIZER.TOKENS = "mask"
    # Prompts decoded at a time; limits the memory and leaves the result as it is. 0 takes what is
    # fast: 2 on a CPU, 16 elsewhere.
    cfg.MODEL.LOCALIZER.CHUNK_SIZE = 0

    # The frozen model of images and text: a name in VISION_LANGUAGE_REGISTRY.
    cfg.MODEL.VISION_LANGUAGE = CN()
    cfg.MODEL.VISION_LANGUAGE.NAME = "OpenClip"
    # Architecture, as open_clip (or, for OpenAIClip, the clip package) names it. For OpenClip also
    # "hf-hub:owner/name" on the Hugging Face hub, or "local-dir:folder" with the same files.
    cfg.MODEL.VISION_LANGUAGE.ARCH = "ViT-L-14-quickgelu"
    # A file, a URL, or a tag of open_clip's for this architecture, such as laion2b_s32b_b82k. Empty
    # means random weights, for tests only, or those that come with hf-hub: and local-dir:.
    cfg.MODEL.VISION_LANGUAGE.WEIGHTS = (
        "https://openaipublic.azureedge.net/clip/models/"
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt"
    )
    # Side in pixels of the images that OpenClip's ViTs take, whose position embeddings are then
    # interpolated; 0 is the size that the model was trained with.
    cfg.MODEL.VISION_LANGUAGE.IMAGE_SIZE = 0
    # Published: True encodes class names as they are spelled (aerosol_can), without the endings
    # -other, -merged and -stuff; False writes blanks for underscores.
    cfg.MODEL.VISION_LANGUAGE.RAW_NAMES = False
    # Sentences that are averaged for each class name, such as ["{}"] for the name by itself; empty
    # takes the model's own, for CLIP "{}." and OpenAI's 80 of ImageNet.
    cfg.MODEL.VISION_LANGUAGE.TEMPLATES = []


def _add_region_head(cfg: CN) -> None:
    # The part that names regions: a name in REGION_HEAD_REGISTRY.
    cfg.MODEL.REGION_HEAD = CN()
    cfg.MODEL.REGION_HEAD.NAME = "RegionSpotHead"
    # The transformer decoder: layers, attention heads, width of the feed-forward part, dropout.
    cfg.MODEL.REGION_HEAD.DEPTH = 3
    cfg.MODEL.REGION_HEAD.NUM_HEADS = 8
    cfg.MODEL.REGION_HEAD.FFN_DIM = 2048
    cfg.MODEL.REGION_HEAD.DROPOUT = 0.1
    # Regions of an image that see each other; more are named in groups, with a warning.
    cfg.MODEL.REGION_HEAD.MAX_REGIONS = 1000
    # For the ablation: False hides the image tokens, which leaves the layers only self-attention.
    cfg.MODEL.REGION_HEAD.IMAGE_TOKENS = True
    # KernelRegionHead: the number of training regions that it compares others with.
    cfg.MODEL.REGION_HEAD.NUM_CENTERS = 0
    cfg.register_renamed_key("MODEL.REGION_HEAD.NUM_CENTRES", "MODEL.REGION_HEAD.NUM_CENTERS")
    # Published: True starts all layers of the decoder as copies of one; False starts each alone.
    cfg.MODEL.REGION_HEAD.COPIED_LAYERS = False
    # AdapterRegionHead: the head whose embeddings it adapts, the share of the adapted ones in the
    # result (CLIP-Adapter's alpha), and how much narrower its hidden layer is than an embedding.
    cfg.MODEL.REGION_HEAD.ADAPTED = "CropRegionHead"
    cfg.MODEL.REGION_HEAD.ADAPTER_SHARE = 0.2
    cfg.MODEL.REGION_HEAD.ADAPTER_REDUCTION = 4
    # Sigmoid focal loss over the vocabulary.
    cfg.MODEL.REGION_HEAD.FOCAL_ALPHA = 0.25
    cfg.MODEL.REGION_HEAD.FOCAL_GAMMA = 2.0
    # "regions" averages the loss over all regions; "images", as published, averages over the
    # regions of each image and adds the images of a process up.
    cfg.MODEL.REGION_HEAD.LOSS_REDUCTION = "regions"

    # Each region is seen in a view of the image, a square around it so many times as large as its
    # longer side; 0 shows all regions in the whole image, as in the paper.
    cfg.MODEL.ZOOM = 0.0
    # Views of an image; more regions than that share the views of a pyramid.
    cfg.MODEL.ZOOM_MAX_VIEWS = 64

    # With ROI_HEADS.NAME RegionSpotROIHeads: the ROI heads whose detections are named, such as
    # StandardROIHeads; empty names the proposals.
    cfg.MODEL.ROI_HEADS.HOST = ""


def _add_naming(cfg: CN) -> None:
    # What a score is: "softmax" over the vocabulary, or "sigmoid", each name for itself.
    cfg.MODEL.NAMING = CN()
    cfg.MODEL.NAMING.SCORES = "softmax"
    # Names that score less are not given: their regions are none of the vocabulary.
    cfg.MODEL.NAMING.THRESHOLD = 0.0
    # Names that take part beside every vocabulary and are never answered, e.g. ["sky", "wall"].
    cfg.MODEL.NAMING.BACKGROUND = []
    # What stands for class names: a yaml file {name: [text, ...]}. Names that it lacks stand for
    # themselves. A predictor without another vocabulary takes the file's.
    cfg.MODEL.NAMING.WORDS = ""
    # Whether a predictor takes the next three from the file that tools/calibrate.py wrote beside
    # the head, unless they are set here. Training and evaluation only read the config.
    cfg.MODEL.NAMING.CALIBRATED = True
    # Logits are divided by TEMPERATURE before a softmax; before a sigmoid by SIGMOID_TEMPERATURE,
    # and SIGMOID_BIAS is added. 1, 1 and 0 leave them as they are.
    cfg.MODEL.NAMING.TEMPERATURE = 1.0
    cfg.MODEL.NAMING.SIGMOID_TEMPERATURE = 1.0
    cfg.MODEL.NAMING.SIGMOID_BIAS = 0.0


def _add_search(cfg: CN) -> None:
    # PanopticRegionSpot: the grid of points (as many columns as rows) that it asks the localizer
    # for, and which masks are good enough, as in SAM's automatic mask generator. What becomes of
    # overlaps and small segments is in MODEL.PANOPTIC_FPN.COMBINE.
    cfg.MODEL.EVERYTHING = CN()
    cfg.MODEL.EVERYTHING.POINTS_PER_SIDE = 32
    cfg.MODEL.EVERYTHING.PRED_IOU_THRESH = 0.88
    cfg.MODEL.EVERYTHING.STABILITY_THRESH = 0.95


def _add_data(cfg: CN) -> None:
    # Your own data: [[name, COCO-format json, image folder], ...], registered before use.
    cfg.DATASETS.COCO_FORMAT = []
    # How often each of DATASETS.TRAIN is drawn from, e.g. [1, 1, 1]; empty goes by their sizes.
    cfg.DATASETS.TRAIN_RATIOS = []
    # What the head was trained on, which splits results into classes with seen and unseen names;
    # empty takes DATASETS.TRAIN.
    cfg.DATASETS.HEAD_TRAINED_ON = []
    # Published: True gives each process' batch images of one dataset and, with Detectron2's
    # ASPECT_RATIO_GROUPING, of one orientation; False mixes them.
    cfg.DATALOADER.ONE_DATASET_PER_BATCH = False
    # Datasets whose rare classes the sampler RepeatFactorTrainingSampler repeats; empty means all.
    cfg.DATALOADER.REPEAT_DATASETS = []
    # Share of the images of an epoch (and of 1000 more) that training and extraction may skip
    # because they cannot be read.
    cfg.DATALOADER.MAX_UNREADABLE_SHARE = 0.01
    # Width times height of an image file; larger ones are refused before they are decoded.
    cfg.INPUT.MAX_PIXELS = 120_000_000
    # Folder of mask tokens by tools/extract_tokens.py; empty runs the localizer in training.
    cfg.INPUT.TOKEN_CACHE = ""
    # With TOKEN_CACHE: the side in pixels that the loader's workers resize images to, the same as
    # the vision-language model's; 0 leaves resizing to the model.
    cfg.INPUT.CACHED_IMAGE_SIZE = 0
    # Published: True flips, resizes and (with p = 0.5) crops the image as RANDOM_FLIP,
    # MIN_SIZE_TRAIN and CROP say, beside cached tokens of the untouched image; False refuses that.
    cfg.INPUT.AUGMENT_CACHED = False


def _add_training(cfg: CN) -> None:
    # Whether heads are trained with MODEL.ZOOM too; each view then costs a pass of the image tower.
    cfg.INPUT.ZOOM_TRAIN = False
    # Precision of SOLVER.AMP: float16 or bfloat16.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Whether gradients in float16 are scaled, so that small ones do not vanish; published: False.
    cfg.SOLVER.AMP.GRAD_SCALER = True
    # Moving average of the trained weights, which evaluations then use.
    cfg.MODEL.EMA = CN({"ENABLED": False, "DECAY": 0.9998})
    # With TEST.EVAL_PERIOD: the result that decides when model_best.pth is saved; with several
    # test sets "<dataset>/bbox/AP".
    cfg.TEST.BEST_METRIC = "bbox/AP"


def _add_evaluation(cfg: CN) -> None:
    # Images of a batch at inference, in each process.
    cfg.TEST.IMS_PER_BATCH = 4
    # The published order of scoring: keep this many (region, name) pairs by softmax before the box
    # score is multiplied in (the authors used 900). 0 multiplies first.
    cfg.TEST.KEEP_BEFORE_PROPOSAL_SCORE = 0
    # Published: True thresholds masks at the size of the model's image and takes the nearest pixel
    # for the output; False scales the logits to the output before they are thresholded.
    cfg.TEST.NEAREST_MASKS = False
    # What computes AP: "hotcoco", or "reference" for pycocotools and lvis (same numbers, slower).
    cfg.TEST.EVALUATION_BACKEND = "hotcoco"
    # LVIS: Fixed AP (10,000 results per class, no limit per image) beside the standard AP.
    cfg.TEST.FIXED_AP = False
    # Accuracy of the names of ground-truth regions, for proposal files made from ground truth.
    cfg.TEST.REGION_CLASSIFICATION = False
