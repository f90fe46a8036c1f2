"""A checkpoint on disk as a read-only mapping of tensors, each read when it is asked for."""

import json
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from gptq_fn.spec import ModelSpec
from gptq_fn_interop.gptq_format import differences, require_readable
from gptq_fn_interop.tensor_files import Entry, headers, read

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

KINDS: dict[str, Any] = dict.fromkeys((*LAYERS, "hidden_size", "vocab_size"), int) | {
    **dict.fromkeys(EXPERTS, int | list | None),
    "model_type": str,
    "intermediate_size": int | list | None,
}
"""What the values of the keys that decide sizes are, where they are given."""


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a directory in Hugging Face's layout: one safetensors file, or shards with an index.

    Only safetensors are read: pickled checkpoints could run code. Raises FileNotFoundError or ValueError, in a
    sentence, for directories that are not such a checkpoint.
    """

    def __init__(self, directory: str | Path):
        """Open the headers of the files; no tensor is read."""
        self.directory = Path(directory)
        self.config = read_json(self.directory / "config.json")
        stored: dict[str, Entry] = {}
        weight_map = self._weight_map()
        for path in self._files(weight_map):
            stored |= {name: entry for name, entry in headers(path).items() if weight_map.get(name, path.name) == path.name}
        self._hold(stored)
        for name, file in weight_map.items():
            if name not in self._stored:
                raise ValueError(f"{INDEX} says that {name} is in {file}, but it is not; the checkpoint in {self.directory} is damaged.")
        self._require_plausible()

    def _hold(self, stored: dict[str, Entry]) -> None:
        self._stored = stored
        self.shapes = {name: entry.shape for name, entry in stored.items()}
        self.dtypes = {name: entry.dtype for name, entry in stored.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(dict.fromkeys(entry.path for entry in self._stored.values()))

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The object that describes the quantization, from config.json or a file of its own; None for a float checkpoint.

        Raises ValueError for one that does not describe GPTQ, or where both are there and say different things.
        """
        inside, path = self.config.get("quantization_config"), self.directory / "quantize_config.json"
        apart = read_json(path) if path.exists() else None
        for found, where in ((inside, self.directory / "config.json"), (apart, path)):
            if found is not None:
                require_readable(found, str(where))
        if inside is not None and apart is not None and (keys := differences(inside, apart)):
            raise ValueError(
                f"config.json and quantize_config.json in {self.directory} disagree on {', '.join(keys)}; remove the one that is wrong."
            )
        return apart if inside is None else inside

    def _weight_map(self) -> dict[str, str]:
        """Where the index says that each tensor is; empty where there is no index."""
        index = self.directory / INDEX
        if not index.exists():
            return {}
        weight_map = read_json(index).get("weight_map")
        if not weight_map or not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map, which says where each tensor is; the index is damaged.")
        for name in weight_map.values():
            # A file may be a link, as in the hub's cache; its name may not lead out of the directory.
            if not isinstance(name, str) or Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} points to {name!r}, which is no file of its directory; the index is damaged or malicious.")
        return weight_map

    def _files(self, weight_map: Mapping[str, str]) -> list[Path]:
        single = (self.directory / SINGLE).exists()
        found = [SINGLE] if single else sorted(path.name for path in self.directory.glob("*.safetensors"))
        named = sorted(set(weight_map.values())) or found
        if not named:
            raise FileNotFoundError(
                f"{self.directory} has no safetensors files. Convert the checkpoint with transformers' save_pretrained first: "
                "pickled files are never read."
            )
        for name in named:
            if not (self.directory / name).exists():
                raise FileNotFoundError(f"{self.directory / name} is named by {INDEX} but is not there; the checkpoint is incomplete.")
        return [self.directory / name for name in named]

    def _require_plausible(self) -> None:
        """Refuse a config with sizes that are none, or more layers or experts than there can be, before anything is built of them."""
        for key, kinds in KINDS.items():
            if key in self.config and (not isinstance(found := self.config[key], kinds) or isinstance(found, bool)):
                raise ValueError(f"config.json in {self.directory} says {key} = {found!r}; that is no {key}.")
        most = max((len(self._stored), *(size for entry in self._stored.values() for size in entry.shape)))
        for keys, limit in ((LAYERS, len(self._stored)), (EXPERTS, most)):
            for key in keys:
                found = self.config.get(key)
                if isinstance(found, int) and found > limit:
                    raise ValueError(
                        f"config.json in {self.directory} says {key} = {found}, but its files hold {len(self._stored)} tensors; "
                        "it belongs to another checkpoint."
                    )

    def aligned(self, spec: ModelSpec) -> "Checkpoint":
        """The same tensors under the names of `spec`: base models are published without the first part of each name."""
        embed = f"{dict(spec.tensors)['embed']}.weight"
        prefix, _, rest = embed.partition(".")
        if embed in self or rest not in self:
            return self
        view = copy(self)
        view._hold({f"{prefix}.{name}": entry for name, entry in self._stored.items()})
        return view

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor of this name; its memory is the caller's. Raises ValueError or OSError as `tensor_files.read` does."""
        return read(name, self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError or ValueError in a sentence."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {path.parent}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}; a Hugging Face checkpoint has one.")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits, and for endless nesting
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object.")
    return found
