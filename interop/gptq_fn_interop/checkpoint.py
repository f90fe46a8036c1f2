"""A checkpoint on disk as a read-only mapping of tensors, each read when it is asked for."""

import json
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy the bfloat16 that safetensors returns
import numpy as np
from safetensors import SafetensorError, safe_open

from gptq_fn.spec import ModelSpec

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a directory in Hugging Face's layout: one safetensors file, or shards with an index.

    Only safetensors are read: pickled checkpoints could run code. Raises FileNotFoundError or ValueError, in a
    sentence, for directories that are not such a checkpoint.
    """

    def __init__(self, directory: str | Path):
        """Open the headers of the files; no tensor is read."""
        self.directory = Path(directory)
        self.config = read_json(self.directory / "config.json")
        self._stored: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self._shards():
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    self._stored[name] = path, name
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(dict.fromkeys(path for path, _ in self._stored.values()))

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The object that describes the quantization, from config.json or a file of its own; None for a float checkpoint."""
        if "quantization_config" in self.config:
            return self.config["quantization_config"]
        apart = self.directory / "quantize_config.json"
        return read_json(apart) if apart.exists() else None

    def _shards(self) -> list[Path]:
        index = self.directory / INDEX
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not weight_map or not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map, which says where each tensor is; the index is damaged.")
            named = sorted(set(map(str, weight_map.values())))
        else:
            single = (self.directory / SINGLE).exists()
            named = [SINGLE] if single else sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not named:
            raise FileNotFoundError(
                f"{self.directory} has no safetensors files. Convert the checkpoint with transformers' save_pretrained first: "
                "pickled files are never read."
            )
        for name in named:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} points to {name!r}, which is no file of its directory; the index is damaged or malicious.")
            if not (self.directory / name).exists():
                raise FileNotFoundError(f"{self.directory / name} is named by {INDEX} but is not there; the checkpoint is incomplete.")
        return [self.directory / name for name in named]

    def aligned(self, spec: ModelSpec) -> "Checkpoint":
        """The same tensors under the names of `spec`: base models are published without the first part of each name."""
        embed = f"{dict(spec.tensors)['embed']}.weight"
        prefix, _, rest = embed.partition(".")
        if embed in self or rest not in self:
            return self
        view = copy(self)
        view._stored = {f"{prefix}.{name}": at for name, at in self._stored.items()}
        view.shapes = {f"{prefix}.{name}": shape for name, shape in self.shapes.items()}
        return view

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor of this name; its memory is the caller's."""
        path, stored_name = self._stored[name]
        with _open(path) as file:  # a file that stays open keeps every page that was read from it in memory
            return file.get_tensor(stored_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError or ValueError in a sentence."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {path.parent}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}; a Hugging Face checkpoint has one.")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object.")
    return found
