"""A copy of a model that refers to its weights becomes one that holds them, for places without a hub's cache."""

from collections.abc import Callable
from pathlib import Path

import yaml

from phi3_mlflow.runtime import manifest, mlmodel
from phi3_mlflow.runtime.snapshots import WEIGHTS, Place


def embed(place: Place, folder: Path, put: Callable[[Path, Path], object]) -> None:
    """Puts the weights that a model refers to into a copy of the model; nothing happens where it holds them.

    The copy keeps the manifest and its digest. A signature of the model does not fit the copy.

    Args:
        place: where the model's weights are.
        folder: the copy, whose MLmodel is written anew.
        put: called with each file in the hub's cache and the path that it is to get.

    Raises:
        WeightsError: the weights are not in the cache, with the command that brings them; or they are damaged, or not
            to be trusted.
    """
    if place.reference is None:
        return
    found = place.find()
    manifest.verify(place.listed, full=False, files=found)
    place.check(found)
    sizes = manifest.sizes(place.listed)
    for name in sizes:
        put(found / name, folder / WEIGHTS / name)
    data = mlmodel.read(folder)
    del data["metadata"]["weights"]["reference"]
    data["model_size_bytes"] = (data.get("model_size_bytes") or 0) + sum(sizes.values())
    (folder / mlmodel.NAME).write_text(yaml.safe_dump(data, allow_unicode=True), "utf-8")
