"""An index of regions: their embeddings in one file, searched by what they look like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arrays import as_numbers
from .modeling.precision import precision_on
from .modeling.questions import as_count
from .vector_files import VectorFileError, check_model, read_vectors, write_vectors

#: Regions up to which a search compares all of them.
MAX_EXACT = 1_000_000
#: How regions are looked for; "auto" is exact up to ``MAX_EXACT``, and FAISS beyond.
METHODS = ("auto", "exact", "faiss")

_KIND = "index of regions"
_CHUNK = 65536  # rows that are held as float32 at a time
_QUERIES = 16  # that share one pass over the embeddings
_MORE = 1000  # that are looked at besides the regions asked for, before all of them are
# FAISS: 4 bits for 2 numbers. On random vectors, the hardest, the 10 nearest are among the 1000
# that it finds in 99.6 of 100 cases; on real ones in more.
_TRAINING_ROWS, _CANDIDATES = 50_000, 1000


class Hits(NamedTuple):
    """The regions nearest to each of Q queries, the nearest first.

    Attributes:
        scores: (Q, K) float32, cosines.
        places: (Q, K) int64, of the regions in the index.
    """

    scores: Tensor
    places: Tensor


class RegionIndex:
    """N regions of any number of images, with their embeddings in text space.

    Attributes:
        embeddings: (N, D) float16, rows of unit length.
        boxes: (N, 4) float32, XYXY, pixels of the image.
        image_places: (N,) int64, of the image of each region in ``images``.
        images: paths in ``folder``, with "/".
        folder: where the images are.
        model: ``vector_files.model_fingerprint`` of the model that embedded them.
        made_with: what to say of that model, such as the name of its config.
    """

    def __init__(
        self,
        embeddings: Tensor,
        boxes: Tensor,
        image_places: Tensor,
        images: Sequence[str],
        *,
        folder: str | os.PathLike[str],
        model: str,
        made_with: str = "",
    ) -> None:
        """Raises a ValueError if the regions are not as the attributes say."""
        self.embeddings = embeddings.half()
        self.boxes = boxes.float()
        self.image_places = image_places.long()
        self.images = list(images)
        self.folder = Path(folder)
        self.model = model
        self.made_with = made_with
        self._check()
        self._scanned: Tensor | None = None
        self._faiss: Any | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: str | None = None) -> RegionIndex:
        """Opens a file that :meth:`save` wrote. It runs nothing, and its embeddings stay on disk.

        Args:
            path: of the file.
            model: the fingerprint of the model that asks; None to look into the file only.

        Raises:
            VectorFileError: it is no index, damaged, or of another model.
            OSError: there is no such file.
        """
        arrays, about = read_vectors(path, _KIND)
        if model is not None:
            check_model(path, about.get("model"), model, about.get("made_with"))
        try:
            images = json.loads(arrays["images"].numpy().tobytes())
            about = {key: str(about[key]) for key in ("folder", "model", "made_with")}
            embeddings, boxes = arrays["embeddings"], arrays["boxes"]
            return cls(embeddings, boxes, arrays["image_places"], images, **about)
        except (LookupError, TypeError, ValueError, RecursionError, AttributeError) as error:
            raise VectorFileError(f"{os.fspath(path)} is not an index: {error}") from error

    @classmethod
    def of_images(
        cls,
        found: Iterable[tuple[str, Tensor, Tensor]],
        *,
        folder: str | os.PathLike[str],
        model: str,
        made_with: str = "",
    ) -> RegionIndex:
        """Makes an index, image by image.

        Args:
            found: of each image its path in ``folder``, the boxes of its R regions (R, 4), and
                their embeddings (R, D), as ``RegionSpotPredictor.region_embeddings`` gives them.
            folder, model, made_with: see above.

        Raises:
            ValueError: there is no region at all, or they are not as the attributes say.
        """
        images, boxes, embeddings, places = list[str](), [], [], []
        for image, own_boxes, own_embeddings in found:
            places.append(torch.full((len(own_boxes),), len(images)))
            images.append(image)
            boxes.append(own_boxes.float().cpu())
            embeddings.append(own_embeddings.half().cpu())
        if not sum(map(len, boxes)):
            raise ValueError("There is no region to put into an index.")
        rows, corners, owners = map(torch.cat, (embeddings, boxes, places))
        return cls(rows, corners, owners, images, folder=folder, model=model, made_with=made_with)

    def by_image(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each image its path, boxes and embeddings, as :meth:`of_images` takes them."""
        order = self.image_places.argsort(stable=True)
        counts = self.image_places.bincount(minlength=len(self.images))
        for image, own in zip(self.images, order.split(counts.tolist())):
            yield image, self.boxes[own], self.embeddings[own]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to a safetensors file; a million regions of width 512 take 1 GB."""
        images = bytearray(json.dumps(self.images).encode())
        arrays = {
            "embeddings": self.embeddings.contiguous(),
            "boxes": self.boxes.contiguous(),
            "image_places": self.image_places.int().contiguous(),
            "images": torch.frombuffer(images, dtype=torch.uint8),
        }
        about = {"folder": str(self.folder), "model": self.model, "made_with": self.made_with}
        write_vectors(path, _KIND, arrays, about)

    def image_of(self, place: int) -> Path:
        """The image file of a region."""
        return self.folder / self.images[int(self.image_places[place])]

    def search(self, queries: Any, topk: int = 10, *, method: str = "auto") -> Hits:
        """Finds the regions nearest to each query.

        Args:
            queries: (Q, D) or (D,): embeddings of texts or of regions, of any length but zero.
            topk: K, at most as many as there are regions.
            method: one of :data:`METHODS`. "exact" compares all regions; "faiss" (the extra
                ``search``) keeps an eighth of the bytes in memory and may miss some. Scores are
                exact either way.

        Raises:
            ValueError: the queries make no sense, or there is no such method.
            ModuleNotFoundError: FAISS is not installed.
        """
        if method not in METHODS:
            raise ValueError(f"method is {method!r:.60}; it must be one of {', '.join(METHODS)}.")
        topk = min(as_count(topk, "topk", "region"), len(self))
        queries = self._as_queries(queries)
        if not topk:
            return Hits(*(queries.new_zeros(len(queries), 0, dtype=d) for d in (None, torch.int64)))
        if method == "faiss" or (method == "auto" and len(self) > MAX_EXACT):
            candidates = self._near(queries, topk)
        else:
            candidates = self._best(queries, topk)
        found = [self._ranked(query, rows, topk) for query, rows in zip(queries, candidates)]
        return Hits(*map(torch.stack, zip(*found)))

    def _as_queries(self, queries: Any) -> Tensor:
        found = as_numbers(queries, "queries").float().cpu()
        found = found[None] if found.dim() == 1 else found
        width = self.embeddings.shape[1]
        if found.dim() != 2 or found.shape[1] != width or not len(found):
            raise ValueError(
                f"The queries have the shape {(*found.shape,)}; (Q, {width}) is expected."
            )
        if not found.isfinite().all() or not found.norm(dim=1).gt(0).all():
            raise ValueError("A query is zero or not finite.")
        return F.normalize(found, dim=1)

    def _best(self, queries: Tensor, topk: int) -> list[Tensor]:
        """For each query the regions among which its nearest are: (K' >= topk,) places.

        In bfloat16, where the CPU computes in it, a query reads half of the bytes, which is what it
        waits for. Rounded to a relative error of u, the numbers of two unit vectors give a product
        that is off by 2u at most (Cauchy and Schwarz), and by u for its own rounding. So no region
        is missing which is that close to the last of the nearest.
        """
        if self._scanned is None:
            dtype = precision_on("auto", torch.device("cpu"))
            self._scanned = self.embeddings.to(dtype)
        scanned, found = self._scanned, list[Tensor]()
        unit = torch.finfo(scanned.dtype).eps / 2
        # float32 adds up as many roundings as there are numbers.
        error = 3.1 * unit + scanned.shape[1] * torch.finfo(torch.float32).eps
        for batch in queries.to(scanned.dtype).split(_QUERIES):
            # One product with a vector is faster than that with a matrix of one column.
            rough = scanned @ (batch[0] if len(batch) == 1 else batch.T)
            for scores in rough.reshape(len(scanned), len(batch)).T.float().contiguous():
                # Far faster than to compare all with the limit, and most often enough.
                best = scores.topk(min(len(scores), topk + _MORE))
                close = best.values >= best.values[topk - 1] - 2 * error
                if close[-1]:
                    found.append((scores >= best.values[topk - 1] - 2 * error).nonzero()[:, 0])
                else:
                    found.append(best.indices[close].sort().values)
        return found

    def _near(self, queries: Tensor, topk: int) -> list[Tensor]:
        """The same by FAISS, which may miss some."""
        if self._faiss is None:
            self._faiss = _faiss_index(self.embeddings)
        count = min(len(self), max(_CANDIDATES, 20 * topk))
        _, places = self._faiss.search(queries.numpy(), count)
        return [row[row >= 0].sort().values for row in torch.from_numpy(places)]

    def _ranked(self, query: Tensor, places: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        parts = [self.embeddings[part].float() @ query for part in places.split(_CHUNK)]
        scores, order = torch.cat(parts).sort(descending=True, stable=True)
        return scores[:topk], places[order[:topk]]

    def _check(self) -> None:
        count, images = len(self.embeddings), self.images
        shapes = [(*each.shape,) for each in (self.embeddings, self.boxes, self.image_places)]
        if self.embeddings.dim() != 2 or shapes[1:] != [(count, 4), (count,)]:
            raise ValueError(f"embeddings, boxes and image_places have the shapes {shapes}")
        if bad := [name for name in images if not _is_inside(name)]:
            raise ValueError(f"the image {bad[0]!r:.80} is not a path inside of a folder")
        places = self.image_places
        if count and not (0 <= int(places.min()) and int(places.max()) < len(images)):
            raise ValueError("regions are of images that it does not list")
        if not self.boxes.isfinite().all():
            raise ValueError("boxes are not finite")
        for part in self.embeddings.split(_CHUNK):
            # Not a number is not close to anything.
            if not ((part.float().norm(dim=1) - 1).abs() < 2e-3).all():
                raise ValueError("embeddings are not of unit length")


def _is_inside(name: Any) -> bool:
    """Whether a path from a file that others may have made leads into its folder, and to no URL."""
    if not isinstance(name, str) or "\0" in name or "://" in name or not name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _faiss_index(embeddings: Tensor) -> Any:
    """Compresses the embeddings to 2 bits a number, by FAISS's product quantizer."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{len(embeddings):,} regions: a search by FAISS, which is for more than "
            f"{MAX_EXACT:,}, needs the package faiss-cpu: pip install regionspot_d2[search]. "
            "The method 'exact' does without.",
            name=error.name,
        ) from error
    count, width = embeddings.shape
    parts = width // 2 if width % 2 == 0 else width
    index = faiss.index_factory(width, f"PQ{parts}x4fs", faiss.METRIC_INNER_PRODUCT)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(count, generator=generator)[:_TRAINING_ROWS].sort().values
    if count < 16:  # its codebooks have 16 entries each
        sample = sample.repeat(-(-16 // count))
    index.train(embeddings[sample].float().numpy())
    for part in embeddings.split(_CHUNK):
        index.add(part.float().numpy())
    return index
