"""LoRA adapters on disk, in peft's own format: `PeftModel.from_pretrained` takes them as they are.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`; its sha256 is taken over
both, and is what a verdict, a receipt and an approval speak of. Reading one checks everything that loading
would otherwise trust. (LoRA: Hu et al. 2021. Rank-stabilised scaling: Kalajdzievski 2023.)
"""

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from learner.base import Base
from learner.errors import AdapterError
from privacy.canonical import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from learner.plan import LoraSettings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# The linear layers of a Qwen2 block, and the part of the block each lives in.
BLOCK_PART = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
# An adapter is small: r 64 on every layer of a 7B model is 0.7 GB in fp32. More is a model or an attack.
BYTES_MAX = 1 << 30
# Real headers have some tens of kB; a header is parsed before anything else is known about the file.
_HEADER_BYTES_MAX = 8 << 20
_BASE_KEY = "base_sha256"


class LoraShape(Protocol):
    """What of a round's LoRA settings reaches the adapter's files."""

    @property
    def r(self) -> int:
        """Rank."""

    @property
    def alpha(self) -> float:
        """Scale of the update before it is divided by r (or its root)."""

    @property
    def dropout(self) -> float:
        """Dropout on the adapter's input while training."""

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(r) instead of alpha / r."""


@dataclass(frozen=True)
class Adapter:
    """A validated adapter in memory.

    Attributes:
        weights: tensors by their names on disk; `A` is (r, in), `B` is (out, r).
        targets: names of adapted linear layers, such as "q_proj".
        layers: indices of adapted blocks, ascending.
        base_sha256: the base it was trained on, None when the file does not say.
    """

    path: Path
    sha256: str
    base_sha256: str | None
    r: int
    alpha: float
    dropout: float
    rslora: bool
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    weights: Mapping[str, "Tensor"]

    @property
    def scaling(self) -> float:
        """What `B A x` is multiplied by before it is added."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def max_abs_delta(self, parent: "Adapter | None" = None) -> float:
        """The largest change of any weight of the base against `parent` (None: the bare base).

        Compares what is added to each linear layer, so different ranks compare too. 0 means that the round
        trained nothing; NaN or infinity that a product overflowed.
        """
        adapters = (self, parent) if parent else (self,)
        modules = {name.rpartition(".lora_")[0] for adapter in adapters for name in adapter.weights}
        changes = []
        for module in modules:
            change = self._added(module)
            if parent:
                change = change - parent._added(module)  # noqa: SLF001 - another of this very class
            changes.append(float(abs(change).max()))
        return next((change for change in changes if not math.isfinite(change)), max(changes))

    def _added(self, module: str) -> "Tensor":
        """What this adapter adds to a linear layer's weight: (out, in), or zero when it leaves it alone."""
        import torch

        down, up = (self.weights.get(f"{module}.lora_{matrix}.weight") for matrix in "AB")
        if down is None or up is None:
            return torch.zeros(())
        return self.scaling * (up.float() @ down.float())


def weight_name(layer: int, target: str, matrix: str) -> str:
    """The name on disk of matrix "A" or "B" of one adapted linear layer."""
    return f"base_model.model.model.layers.{layer}.{BLOCK_PART[target]}.{target}.lora_{matrix}.weight"


def adapter_sha256(folder: Path) -> str:
    """sha256 over the canonical {file name: sha256} of the adapter's two files.

    Raises:
        AdapterError: one of them is missing.
    """
    hashes = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            with (folder / name).open("rb") as file:
                hashes[name] = file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise AdapterError(
                f"adapter {folder}: {name} cannot be read ({error.strerror}); fetch or train it anew"
            ) from error
    return sha256_of(hashes)


def write_adapter(folder: Path, settings: LoraShape, weights: Mapping[str, "Tensor"], base: Base) -> str:
    """Write an adapter; answer its sha256. Atomic, and the same bytes for the same weights.

    Args:
        folder: made by this call; when it already holds the very same adapter, nothing happens.
        settings: rank, alpha, dropout and scaling rule.
        weights: every `A` and `B` by its `weight_name`, fp32.
        base: the base it belongs to.

    Raises:
        AdapterError: names or shapes are wrong, a value is not finite, or `folder` holds something else.
    """
    from safetensors.torch import save_file

    # Copied: safetensors refuses tensors that share memory, and these may be views of one flat buffer.
    tensors = {name: weights[name].detach().to("cpu", copy=True).contiguous() for name in sorted(weights)}
    layers, targets = _places(tensors, settings.r, _base_shapes(base), folder)
    _finite(tensors, folder)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": "layers",
        "layers_to_transform": list(layers),
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.r,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": settings.rslora,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        (work / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        # One key only: safetensors writes several in random order, and the hash would differ from run to run.
        save_file(tensors, work / WEIGHTS_FILE, metadata={_BASE_KEY: base.sha256})
        digest = adapter_sha256(work)
        if folder.is_dir() and any(folder.iterdir()):
            if adapter_sha256(folder) != digest:
                raise AdapterError(f"adapter {folder}: holds another adapter; give an empty or new folder")
            return digest
        work.chmod(0o755)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return digest


def read_adapter(
    folder: Path, base_sha256: str | None = None, *, base: Base | None = None, bytes_max: int = BYTES_MAX
) -> Adapter:
    """Read and validate an adapter, wherever it came from.

    Args:
        folder: where its two files are.
        base_sha256: refuse an adapter that names another base.
        base: also compare layers, targets and shapes with this base's config (implies its sha256).
        bytes_max: refuse larger weight files unread.

    Raises:
        AdapterError: a file is missing, cut short, too large or no LoRA adapter of a Qwen2 model; a name,
            rank or shape does not fit; a value is not finite; it belongs to another base.
    """
    digest = adapter_sha256(folder)
    config = _read_config(folder / CONFIG_FILE)
    metadata = _check_header(folder / WEIGHTS_FILE, bytes_max)
    named = metadata.get(_BASE_KEY)
    wanted = base.sha256 if base else base_sha256
    if wanted and named and named != wanted:
        raise AdapterError(
            f"adapter {folder}: base_sha256={named}, must be {wanted}; use it with the base it was trained on"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{folder / WEIGHTS_FILE}: cannot be read ({error}); fetch or train it anew") from error
    layers, targets = _places(weights, config["r"], _base_shapes(base) if base else None, folder)
    _agree(config, layers, targets, folder)
    _finite(weights, folder)
    return Adapter(
        path=folder,
        sha256=digest,
        base_sha256=named,
        r=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora", False)),
        targets=targets,
        layers=layers,
        weights=weights,
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The adapter's settings, with what this system relies on checked."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: is no JSON ({error}); fetch or train it anew") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: is a {type(config).__name__}, must be a JSON object; fetch or train it anew")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"r={rank!r} in {path}: must be an integer > 0; fetch or train it anew")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha) or alpha <= 0:
        raise AdapterError(f"lora_alpha={alpha!r} in {path}: must be a number > 0; fetch or train it anew")
    # What would change the function without being in the A and B matrices that are validated here.
    for key, plain in (
        ("peft_type", "LORA"),
        ("bias", "none"),
        ("modules_to_save", None),
        ("use_dora", None),
        ("fan_in_fan_out", None),
        ("rank_pattern", None),
        ("alpha_pattern", None),
    ):
        if (config.get(key) or None) != plain:
            raise AdapterError(f"{key}={config.get(key)!r} in {path}: must be {plain!r}; train a plain LoRA adapter")
    return config


def _check_header(path: Path, bytes_max: int) -> dict[str, str]:
    """Compare the file's size with what its header promises; answer the header's metadata."""
    size = path.stat().st_size
    if size > bytes_max:
        raise AdapterError(
            f"{path}: {size} bytes, must be <= {bytes_max}; a LoRA adapter is smaller, check what this is"
        )
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_BYTES_MAX, size):
                raise AdapterError(
                    f"{path}: header of {length} bytes in a file of {size}; it is damaged, fetch it anew"
                )
            header = json.loads(file.read(length))
            end = max(
                (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
                default=0,
            )
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{path}: header cannot be read ({error!r}); it is cut short or no safetensors, fetch it anew"
        ) from error
    if 8 + length + end != size:
        raise AdapterError(
            f"{path}: {size} bytes, must be {8 + length + end} by its header; it is damaged, fetch it anew"
        )
    metadata: dict[str, str] = header.get("__metadata__", {})
    return metadata


def _base_shapes(base: Base) -> tuple[int, dict[str, tuple[int, int]]]:
    """Number of blocks, and (out, in) of every linear layer in one, from the base's config."""
    try:
        config = json.loads((base.path / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        keys = head * config["num_key_value_heads"]
        wide = config["intermediate_size"]
        layers: int = config["num_hidden_layers"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AdapterError(
            f"base {base.name} in {base.path}: config cannot be read ({error!r}); prepare the base anew"
        ) from error
    return layers, {
        "q_proj": (head * heads, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, head * heads),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
    }


def trained_weights(base: Base, settings: "LoraSettings") -> int:
    """P, how many weights a round of these settings trains on a base, from its config alone.

    Raises:
        AdapterError: the config cannot be read.
    """
    layers, shapes = _base_shapes(base)
    each = sum(settings.r * sum(shape) for target, shape in shapes.items() if target in settings.targets)
    return each * len(settings.layer_indices(layers))


def _places(
    weights: Mapping[str, "Tensor"],
    rank: int,
    shapes: tuple[int, dict[str, tuple[int, int]]] | None,
    folder: Path,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The layers and targets these weights adapt, after checking every name and shape."""
    found: dict[tuple[int, str], dict[str, tuple[int, ...]]] = {}
    for name, tensor in weights.items():
        layer, target, matrix = _parse_name(name, folder)
        if shapes and layer >= shapes[0]:
            raise AdapterError(
                f"{name} in {folder}: layer must be < {shapes[0]}; use it with the base it was trained on"
            )
        found.setdefault((layer, target), {})[matrix] = tuple(tensor.shape)
    if not found:
        raise AdapterError(f"adapter {folder}: has no weights; train it anew")
    layers = tuple(sorted({layer for layer, _ in found}))
    targets = tuple(sorted({target for _, target in found}))
    for layer in layers:
        for target in targets:
            pair = found.get((layer, target), {})
            for matrix in ("A", "B"):
                if matrix not in pair:
                    raise AdapterError(f"{weight_name(layer, target, matrix)} in {folder}: is missing; train it anew")
            out_in = shapes[1][target] if shapes else (pair["B"][0], pair["A"][-1])
            want = {"A": (rank, out_in[1]), "B": (out_in[0], rank)}
            for matrix in ("A", "B"):
                if pair[matrix] != want[matrix]:
                    raise AdapterError(
                        f"{weight_name(layer, target, matrix)} in {folder}: shape={pair[matrix]}, "
                        f"must be {want[matrix]}; use it with the base and rank it was trained with"
                    )
    return layers, targets


def _parse_name(name: str, folder: Path) -> tuple[int, str, str]:
    parts = name.split(".")
    if len(parts) == 9 and parts[4].isdigit() and parts[6] in BLOCK_PART and parts[7] in {"lora_A", "lora_B"}:  # noqa: PLR2004
        layer, target, matrix = int(parts[4]), parts[6], parts[7][-1]
        if name == weight_name(layer, target, matrix):
            return layer, target, matrix
    raise AdapterError(
        f"weight {name[:200]!r} in {folder}: must be like {weight_name(0, 'q_proj', 'A')!r}; train a plain LoRA adapter"
    )


def _agree(config: Mapping[str, Any], layers: Sequence[int], targets: Sequence[str], folder: Path) -> None:
    """Refuse a config that would have peft adapt other places than the weights are for."""
    named = config.get("target_modules")
    if not isinstance(named, list) or sorted(map(str, named)) != list(targets):
        raise AdapterError(
            f"target_modules={named!r} in {folder}: must be {list(targets)} as in the weights; train it anew"
        )
    indices = config.get("layers_to_transform")
    if indices is None and list(layers) == list(range(len(layers))):
        return
    if [indices] != list(layers) if isinstance(indices, int) else sorted(indices or ()) != list(layers):
        raise AdapterError(
            f"layers_to_transform={indices!r} in {folder}: must be {list(layers)} as in the weights; train it anew"
        )


def _finite(weights: Mapping[str, "Tensor"], folder: Path) -> None:
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{name} in {folder}: dtype={tensor.dtype}, must be floating point; train it anew")
        if not tensor.isfinite().all():
            raise AdapterError(f"{name} in {folder}: holds NaN or infinity, must be finite; train it anew")
