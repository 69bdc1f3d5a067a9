"""Names by example: regions of images that show what a name means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.images import ImageLike
from .vector_files import (
    VectorFileError,
    check_model,
    model_fingerprint,
    read_vectors,
    write_vectors,
)

if TYPE_CHECKING:
    from .predictor import RegionSpotPredictor

_KIND = "file of examples"


class Exemplar(NamedTuple):
    """A class name and the point of text space that its examples have in common.

    Attributes:
        name: the class name.
        vector: (D,), of unit length.
    """

    name: str
    vector: Tensor


class Exemplars:
    """Examples of class names, for what no text describes: a part, a symbol, one own cup.

    Names that text knows should keep their text: it is most often better than a few examples.

    Example::

        examples = Exemplars(predictor)
        examples.add("our logo", "box.jpg", boxes=[[10, 20, 60, 80]])
        predictor.set_image("shelf.jpg")
        vectors = predictor.region_embeddings(boxes=boxes)
        names = [list(examples.vectors)[i] for i in examples.similarities(vectors).argmax(1)]

    Attributes:
        vectors: by name (K, D), the embeddings of its K examples, rows of unit length.
        model: ``vector_files.model_fingerprint`` of the model that embedded them.
    """

    def __init__(self, predictor: RegionSpotPredictor) -> None:
        self.vectors: dict[str, Tensor] = {}
        self.model = model_fingerprint(predictor.model)
        self._predictor = predictor

    def __len__(self) -> int:
        return len(self.vectors)

    def add(self, name: str, image: ImageLike | None, **regions: Any) -> None:
        """Adds regions of an image as examples of a name. The predictor's image is then this one.

        Args:
            name: a class name; it may have examples already.
            image: as for ``RegionSpotPredictor.set_image``; None for the one that is set.
            **regions: ``boxes``, ``points``, ``point_labels``, ``masks`` and ``zoom``, as for
                ``RegionSpotPredictor.region_embeddings``.

        Raises:
            ValueError: the name is empty, there is no region, or one makes no sense.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"The name of an example is {name!r:.60}: give non-empty text.")
        if image is not None:
            self._predictor.set_image(image)
        found = self._predictor.region_embeddings(**regions).float().cpu()
        if not len(found):
            raise ValueError(f"There is no region to be an example of '{name:.60}'.")
        known = self.vectors.get(name)
        self.vectors[name] = found if known is None else torch.cat([known, found])

    def members(self) -> list[Exemplar]:
        """The names, each with the mean of its examples."""
        return [
            Exemplar(name, F.normalize(vectors.mean(0), dim=0))
            for name, vectors in self.vectors.items()
        ]

    def similarities(self, embeddings: Tensor, nearest: int | None = None) -> Tensor:
        """Compares regions with the names.

        Args:
            embeddings: (R, D), of ``RegionSpotPredictor.region_embeddings``.
            nearest: how many of the nearest examples of a name are averaged; None takes the vector
                of :meth:`members`, which suits names whose examples look alike.

        Returns:
            (R, C) cosines, names in the order of :attr:`vectors`.
        """
        rows = F.normalize(embeddings.float().cpu(), dim=1)
        if nearest is None:
            return rows @ torch.stack([member.vector for member in self.members()]).T
        columns = [rows @ vectors.T for vectors in self.vectors.values()]
        return torch.stack(
            [found.topk(min(nearest, found.shape[1])).values.mean(1) for found in columns], dim=1
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the examples to a safetensors file, without the images; ValueError if none."""
        if not self.vectors:
            raise ValueError("There are no examples to save.")
        arrays = {f"{i}": vectors.contiguous() for i, vectors in enumerate(self.vectors.values())}
        write_vectors(path, _KIND, arrays, {"names": list(self.vectors), "model": self.model})

    @classmethod
    def load(cls, path: str | os.PathLike[str], predictor: RegionSpotPredictor) -> Exemplars:
        """Reads what :meth:`save` wrote. It runs nothing.

        Raises:
            VectorFileError: the file is damaged, of another kind, or of another model.
            OSError: there is no such file.
        """
        arrays, about = read_vectors(path, _KIND)
        examples, names = cls(predictor), about.get("names", [])
        check_model(path, about.get("model"), examples.model, None)
        width = predictor.model.vision_language.text_dim
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            names = []
        if not names or len(set(names)) != len(names) or len(names) != len(arrays):
            raise VectorFileError(f"{os.fspath(path)} does not name its examples one by one.")
        for i, name in enumerate(names):
            rows = arrays.get(str(i), torch.zeros(0)).float()
            good = rows.dim() == 2 and len(rows) > 0 and rows.shape[1] == width
            # Not a number is not close to anything.
            if not good or not ((rows.norm(dim=1) - 1).abs() < 1e-3).all():
                raise VectorFileError(
                    f"{os.fspath(path)}: '{name:.60}' has no unit vectors of width {width}."
                )
            examples.vectors[name] = rows.clone()
        return examples
