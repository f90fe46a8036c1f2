"""AutoGPTQ's description of a quantization, and what it means here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gptq_fn import QuantConfig
from gptq_fn_interop.checkpoint import read_json
from gptq_fn_interop.hub import local
from gptq_fn_interop.shards import write_json

FILE = "quantize_config.json"


@dataclass
class BaseQuantizeConfig:
    """AutoGPTQ's options with its defaults. Raises ValueError, in a sentence, for what is impossible or of another format.

    Where AutoGPTQ leaves room, the better way is taken: scales are searched, and without desc_act the columns are still
    solved by importance, inside and among their groups, which leaves g_idx as it is without. What is asymmetric is written
    as "gptq_v2", since "gptq" has no room for a zero point of 0; everything else as "gptq".
    """

    bits: int = 4
    group_size: int = -1
    """Inputs that share a scale; -1 means that a whole row does."""
    damp_percent: float | None = 0.01
    """Added to the Hessian's diagonal, relative to its mean; None leaves the choice to gptq_fn (see QuantConfig.damp)."""
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    is_marlin_format: bool = False
    model_name_or_path: str | None = None
    """The directory that the model was last saved to; `push_to_hub` uploads it."""
    model_file_base_name: str | None = None
    """The name of the weights' file without .safetensors, by default "model"."""
    awq_gemm_checkpoint: bool = False
    quant_method: str = "gptq"
    checkpoint_format: str = "gptq"

    def __post_init__(self) -> None:
        if (
            self.is_marlin_format
            or self.awq_gemm_checkpoint
            or self.quant_method != "gptq"
            or self.checkpoint_format not in ("gptq", "gptq_v2")
        ):
            found = (
                "marlin"
                if self.is_marlin_format
                else "awq"
                if self.awq_gemm_checkpoint
                else f"{self.quant_method}, {self.checkpoint_format}"
            )
            raise ValueError(
                f"Models of the quantization method gptq in the formats gptq and gptq_v2 can be read and made, but this config asks for "
                f"{found}. Take the checkpoint that it was converted from."
            )
        self.quant_config()

    def quant_config(self) -> QuantConfig:
        """The same for gptq_fn. Raises ValueError for impossible values."""
        return QuantConfig(
            bits=self.bits,  # type: ignore[arg-type]
            group_size=None if self.group_size == -1 else self.group_size,
            sym=self.sym,
            damp=self.damp_percent,
            order="act" if self.desc_act else "group",
            static_groups=self.static_groups,
            sequential=self.true_sequential,
        )

    def to_dict(self) -> dict[str, Any]:
        """The options by name."""
        return asdict(self)

    def save_pretrained(self, save_dir: str | Path) -> None:
        """Write quantize_config.json into a directory."""
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(save_dir) / FILE, self.to_dict())

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> "BaseQuantizeConfig":
        """From what a checkpoint says of itself; keys of other writers are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in described.items() if key in known})

    @classmethod
    def from_pretrained(cls, save_dir: str | Path) -> "BaseQuantizeConfig":
        """From a directory or a model on the hub. Raises ValueError where it says nothing of a quantization."""
        directory = local(save_dir)
        if not (described := description(directory)):
            raise ValueError(f"Neither {FILE} nor config.json in {directory} tells of a quantization.")
        return cls.from_dict(described)


def description(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of its quantization, in quantize_config.json, config.json or both; empty for a float one."""
    apart, model = (read_json(path) if path.exists() else {} for path in (directory / FILE, directory / "config.json"))
    return {**apart, **(model.get("quantization_config") or {})}
