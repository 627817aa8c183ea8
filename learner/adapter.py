"""Adapters on disk, in peft's own format: `PeftModel.from_pretrained` takes them as they are.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. When bottleneck adapters were trained
along, a third file, `bottleneck.safetensors`, holds them; peft has no such layers, so the config then names a type that
peft refuses instead of loading half. The adapter's sha256 is taken over all its files, and is what a verdict, a receipt
and an approval speak of. Reading one checks everything that loading would otherwise trust.
(LoRA: Hu et al. 2021. Rank-stabilised scaling: Kalajdzievski 2023. Bottlenecks: Houlsby et al. 2019.)
"""

import json
import math
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.base import Base
from learner.errors import AdapterError
from learner.layout import (
    BLOCK_PART,
    BOTTLENECK_MATRICES,
    HEAD,
    NONLINEARITIES,
    PLACES,
    BaseShapes,
    base_shapes,
    bottleneck_name,
    chosen,
    layout,
    module_name,
    pattern_error,
    scaling,
    weight_name,
)
from privacy.canonical import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from learner.plan import LoraSettings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BOTTLENECK_FILE = "bottleneck.safetensors"
# peft looks this up among its types, and its error shows it; vLLM refuses `modules_to_save`.
BOTTLENECK_TYPE = f"LORA, and bottleneck adapters in {BOTTLENECK_FILE}: only Tidegate's in-process engine has these"
# An adapter is small: r 64 on every layer of a 7B model is 0.7 GB in fp32. More is a model or an attack.
BYTES_MAX = 1 << 30
# Real headers have some tens of kB; a header is parsed before anything else is known about the file.
_HEADER_BYTES_MAX = 8 << 20
_BASE_KEY = "base_sha256"
# What is added to the vocabulary projection is as large as the embedding: looked at in parts of so many rows.
_ROWS = 4096


@dataclass(frozen=True)
class Bottleneck:
    """The bottleneck adapters that came along: z + up f(down z + down_bias) + up_bias behind some sublayers."""

    width: int
    places: tuple[str, ...]
    nonlinearity: str


@dataclass(frozen=True)
class Adapter:
    """A validated adapter in memory.

    Attributes:
        r, alpha: of the linear layers that no pattern fits.
        rank_pattern, alpha_pattern: peft's, in order.
        targets: names of adapted linear layers, such as "q_proj".
        layers: indices of adapted blocks, ascending; empty when only the vocabulary projection is adapted.
        bottleneck: None when there is none.
        weights: tensors by their names on disk; `A` is (r, in), `B` is (out, r).
        base_sha256: the base it was trained on, None when the file does not say.
    """

    path: Path
    sha256: str
    base_sha256: str | None
    r: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    bottleneck: Bottleneck | None
    weights: Mapping[str, "Tensor"]

    @property
    def scaling(self) -> float:
        """What `B A x` is multiplied by where no pattern fits."""
        return scaling(self.alpha, self.r, rslora=self.rslora)

    def scale_of(self, module: str) -> float:
        """What a module's `B A x` is multiplied by before it is added; "model.layers.3.mlp.up_proj" is a module."""
        rank = chosen(self.rank_pattern, module, self.r)
        return scaling(chosen(self.alpha_pattern, module, self.alpha), rank, rslora=self.rslora)

    def places(self) -> Iterator[tuple[int, str]]:
        """Each adapted linear layer: (block, target); the vocabulary projection as (-1, "lm_head")."""
        yield from ((layer, target) for layer in self.layers for target in self.targets if target != HEAD)
        if HEAD in self.targets:
            yield -1, HEAD

    def bottlenecks(self) -> Iterator[tuple[int, str]]:
        """Each bottleneck adapter: (block, the sublayer it stands behind)."""
        if self.bottleneck:
            yield from ((layer, place) for layer in self.layers for place in self.bottleneck.places)

    def max_abs_delta(self, parent: "Adapter | None" = None) -> float:
        """The largest change of any weight of the base against `parent` (None: the bare base).

        Compares what is added to each linear layer, so different ranks compare too; and what each bottleneck adds, as
        if its nonlinearity let everything through. 0 means that the round trained nothing; NaN or infinity that a
        product overflowed.
        """
        adapters = (self, parent) if parent else (self,)
        changes = []
        for layer, target in sorted({place for adapter in adapters for place in adapter.places()}):
            mine, theirs = self._pair(layer, target), parent._pair(layer, target) if parent else None  # noqa: SLF001
            changes.append(_largest_change(mine, theirs))
        for layer, place in sorted({place for adapter in adapters for place in adapter.bottlenecks()}):
            mine, theirs = self._linear(layer, place), parent._linear(layer, place) if parent else None  # noqa: SLF001
            changes.append(_largest_change(mine, theirs))
        return next((change for change in changes if not math.isfinite(change)), max(changes))

    def _pair(self, layer: int, target: str) -> "tuple[Tensor, Tensor] | None":
        """(out, r) scaled and (r, in), whose product is added to a linear layer; None when it is left alone."""
        down, up = (self.weights.get(weight_name(layer, target, matrix)) for matrix in "AB")
        if down is None or up is None:
            return None
        return up.float() * self.scale_of(module_name(layer, target)), down.float()

    def _linear(self, layer: int, place: str) -> "tuple[Tensor, Tensor] | None":
        """(H, w + 1) and (w + 1, H + 1), whose product is what a bottleneck without its nonlinearity adds to (z, 1)."""
        import torch

        found = [self.weights.get(bottleneck_name(layer, place, matrix)) for matrix in BOTTLENECK_MATRICES]
        down, down_bias, up, up_bias = (None if each is None else each.float() for each in found)
        if down is None or down_bias is None or up is None or up_bias is None:
            return None
        one = torch.zeros(1, down.shape[1] + 1)
        one[0, -1] = 1.0
        inner = torch.cat((torch.cat((down, down_bias[:, None]), dim=1), one))
        return torch.cat((up, up_bias[:, None]), dim=1), inner


def _largest_change(mine: "tuple[Tensor, Tensor] | None", theirs: "tuple[Tensor, Tensor] | None") -> float:
    """The largest |mine - theirs| of two products, _ROWS rows at a time; None is zero."""
    pairs = [pair for pair in (mine, theirs) if pair]
    changes = [0.0]
    for first in range(0, max(len(outer) for outer, _ in pairs), _ROWS):
        products = [outer[first : first + _ROWS] @ inner for outer, inner in pairs]
        change = products[0] - products[1] if len(products) > 1 else products[0]
        changes.append(float(abs(change).max()))
    return next((change for change in changes if not math.isfinite(change)), max(changes))


def adapter_files(folder: Path) -> tuple[str, ...]:
    """The names of the files an adapter is made of: its config says whether there is a third."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        config = None  # whoever goes on to read it will say what is wrong
    more = isinstance(config, dict) and config.get("bottleneck") is not None
    return (CONFIG_FILE, WEIGHTS_FILE, BOTTLENECK_FILE) if more else (CONFIG_FILE, WEIGHTS_FILE)


def adapter_sha256(folder: Path) -> str:
    """sha256 over the canonical {file name: sha256} of the adapter's files.

    Raises:
        AdapterError: one of them is missing.
    """
    hashes = {}
    for name in adapter_files(folder):
        try:
            with (folder / name).open("rb") as file:
                hashes[name] = file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise AdapterError(
                f"adapter {folder}: {name} cannot be read ({error.strerror}); fetch or train it anew"
            ) from error
    return sha256_of(hashes)


def write_adapter(folder: Path, settings: "LoraSettings", weights: Mapping[str, "Tensor"], base: Base) -> str:
    """Write an adapter; answer its sha256. Atomic, and the same bytes for the same weights.

    Args:
        folder: made by this call; when it already holds the very same adapter, nothing happens.
        settings: ranks, alphas, dropout, scaling rule and bottleneck; where they stand is read off the weights.
        weights: every trained matrix by its name on disk (`learner.layout`), fp32.
        base: the base it belongs to.

    Raises:
        AdapterError: names or shapes are wrong, a value is not finite, or `folder` holds something else.
    """
    from safetensors.torch import save_file

    # Copied: safetensors refuses tensors that share memory, and these may be views of one flat buffer.
    tensors = {name: weights[name].detach().to("cpu", copy=True).contiguous() for name in sorted(weights)}
    files = _by_file(tensors)
    shapes = _base_shapes(base)
    layers, targets = _places(files[WEIGHTS_FILE], _Ranks(settings.r, settings.rank_pattern), shapes, folder)
    config = _peft_config(settings, layers, targets, base)
    if BOTTLENECK_FILE in files:
        shape = Bottleneck(settings.bottleneck, _present(files[BOTTLENECK_FILE]), settings.nonlinearity)
        _same_layers(layers, _check_bottleneck(files[BOTTLENECK_FILE], shape, shapes, folder), folder)
        config |= {"peft_type": BOTTLENECK_TYPE, "modules_to_save": list(shape.places), "bottleneck": _as_json(shape)}
    _finite(tensors, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        (work / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name, part in files.items():
            # One key only: safetensors writes several in random order, and the hash would differ from run to run.
            save_file(part, work / name, metadata={_BASE_KEY: base.sha256})
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


def _by_file(tensors: Mapping[str, "Tensor"]) -> dict[str, dict[str, "Tensor"]]:
    files: dict[str, dict[str, Tensor]] = {WEIGHTS_FILE: {}}
    for name, tensor in tensors.items():
        own = name.startswith("bottleneck.")
        files.setdefault(BOTTLENECK_FILE if own else WEIGHTS_FILE, {})[name] = tensor
    return files


def _peft_config(settings: "LoraSettings", layers: Sequence[int], targets: Sequence[str], base: Base) -> dict[str, Any]:
    """What peft reads. Patterns become one entry per module that differs, so that their order says nothing."""
    modules = [module_name(layer, target) for target in targets if target != HEAD for layer in layers]
    modules += [HEAD] * (HEAD in targets)
    ranks = {module: settings.rank_of(module) for module in modules}
    alphas = {module: chosen(settings.alpha_pattern, module, settings.alpha) for module in modules}
    return {
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != settings.alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        # The embedding is tied to the vocabulary projection; what is trained here belongs to the projection alone.
        "ensure_weight_tying": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": "layers" if layers else None,
        "layers_to_transform": list(layers) or None,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.r,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != settings.r},
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": settings.rslora,
    }


def read_adapter(
    folder: Path, base_sha256: str | None = None, *, base: Base | None = None, bytes_max: int = BYTES_MAX
) -> Adapter:
    """Read and validate an adapter, wherever it came from.

    Args:
        folder: where its files are.
        base_sha256: refuse an adapter that names another base.
        base: also compare layers, targets and shapes with this base's config (implies its sha256).
        bytes_max: refuse larger weight files unread.

    Raises:
        AdapterError: a file is missing, cut short, too large or no adapter of a Qwen2 model; a name,
            rank or shape does not fit; a value is not finite; it belongs to another base.
    """
    digest = adapter_sha256(folder)
    config = _read_config(folder / CONFIG_FILE)
    shapes = _base_shapes(base) if base else None
    wanted = base.sha256 if base else base_sha256
    weights, named = _read_weights(folder / WEIGHTS_FILE, wanted, bytes_max)
    patterns = {key: tuple((config.get(key) or {}).items()) for key in ("rank_pattern", "alpha_pattern")}
    layers, targets = _places(weights, _Ranks(config["r"], patterns["rank_pattern"]), shapes, folder)
    _agree(config, layers, targets, folder)
    bottleneck = None
    if config.get("bottleneck") is not None:
        bottleneck = _bottleneck(config["bottleneck"], folder)
        more, _ = _read_weights(folder / BOTTLENECK_FILE, wanted, bytes_max)
        layers = _same_layers(layers, _check_bottleneck(more, bottleneck, shapes, folder), folder)
        weights |= more
    _finite(weights, folder)
    return Adapter(
        path=folder,
        sha256=digest,
        base_sha256=named,
        r=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora", False)),
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
        targets=targets,
        layers=layers,
        bottleneck=bottleneck,
        weights=weights,
    )


def _read_weights(path: Path, wanted: str | None, bytes_max: int) -> tuple[dict[str, "Tensor"], str | None]:
    """A weight file's tensors, and the base it names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    named = _check_header(path, bytes_max).get(_BASE_KEY)
    if wanted and named and named != wanted:
        raise AdapterError(
            f"adapter {path.parent}: base_sha256={named}, must be {wanted}; use it with the base it was trained on"
        )
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read ({error}); fetch or train it anew") from error
    return weights, named


def _read_config(path: Path) -> dict[str, Any]:
    """The adapter's settings, with what this system relies on checked."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: is no JSON ({error}); fetch or train it anew") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: is a {type(config).__name__}, must be a JSON object; fetch or train it anew")
    _rank(config.get("r"), "r", path)
    _alpha(config.get("lora_alpha"), "lora_alpha", path)
    for key, check in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{key}={patterns!r} in {path}: must be a JSON object; train it anew")
        for pattern, value in patterns.items():
            check(value, f"{key}[{pattern!r}]", path)
            if wrong := pattern_error(pattern):
                raise AdapterError(f"{key} in {path}: {wrong}; train it anew")
    own = config.get("bottleneck") is not None
    # What would change the function without being in the matrices that are validated here.
    for key, plain in (
        ("peft_type", BOTTLENECK_TYPE if own else "LORA"),
        ("bias", "none"),
        ("use_dora", None),
        ("fan_in_fan_out", None),
        ("ensure_weight_tying", None),
        ("alora_invocation_tokens", None),
    ):
        if (config.get(key) or None) != plain:
            raise AdapterError(f"{key}={config.get(key)!r} in {path}: must be {plain!r}; train a plain LoRA adapter")
    if config.get("modules_to_save") and not own:
        raise AdapterError(
            f"modules_to_save={config['modules_to_save']!r} in {path}: must be None; train a plain LoRA adapter"
        )
    return config


def _rank(value: object, name: str, path: Path) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{name}={value!r} in {path}: must be an integer > 0; fetch or train it anew")


def _alpha(value: object, name: str, path: Path) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise AdapterError(f"{name}={value!r} in {path}: must be a number > 0; fetch or train it anew")


def _bottleneck(value: Any, folder: Path) -> Bottleneck:
    """The config's own part, checked."""
    try:
        found = Bottleneck(int(value["width"]), tuple(map(str, value["places"])), str(value["nonlinearity"]))
    except (LookupError, TypeError, ValueError) as error:
        raise AdapterError(
            f"bottleneck={value!r:.200} in {folder}: cannot be read ({error!r}); train it anew"
        ) from error
    if (
        found.width < 1
        or found.nonlinearity not in NONLINEARITIES
        or not found.places
        or set(found.places) - set(PLACES)
    ):
        raise AdapterError(
            f"bottleneck={value!r:.200} in {folder}: must have a width > 0, places among {','.join(PLACES)} and a "
            f"nonlinearity among {','.join(NONLINEARITIES)}; train it anew"
        )
    return found


def _as_json(shape: Bottleneck) -> dict[str, Any]:
    return {"width": shape.width, "places": list(shape.places), "nonlinearity": shape.nonlinearity}


def _present(weights: Mapping[str, "Tensor"]) -> tuple[str, ...]:
    """The places some bottleneck weights name."""
    return tuple(place for place in PLACES if any(f".{place}." in name for name in weights))


def _check_bottleneck(
    weights: Mapping[str, "Tensor"], shape: Bottleneck, shapes: BaseShapes | None, folder: Path
) -> tuple[int, ...]:
    """Exactly the matrices and biases of these places, in their shapes; answers the layers they are in."""
    found = {int(match[1]) for name in weights if (match := re.match(r"bottleneck\.layers\.(\d{1,4})\.", name))}
    layers = tuple(layer for layer in sorted(found) if shapes is None or layer < shapes.depth)
    some = weights.get(bottleneck_name(layers[0], shape.places[0], "up_bias")) if layers and shape.places else None
    hidden = shapes.hidden if shapes else 0 if some is None else some.numel()
    want = {
        "down": (shape.width, hidden),
        "down_bias": (shape.width,),
        "up": (hidden, shape.width),
        "up_bias": (hidden,),
    }
    names = {
        bottleneck_name(layer, place, matrix): want[matrix]
        for layer in layers
        for place in shape.places
        for matrix in BOTTLENECK_MATRICES
    }
    if names.keys() != weights.keys() or not names:
        different = min(names.keys() ^ weights.keys(), default="nothing")
        raise AdapterError(
            f"{different[:200]!r} in {folder / BOTTLENECK_FILE}: is missing there or does not belong there; "
            "train it anew, and use it with its own base"
        )
    for name, expected in names.items():
        if (size := tuple(weights[name].shape)) != expected:
            raise AdapterError(f"{name} in {folder}: shape={size}, must be {expected}; use it with its own base")
    return layers


def _same_layers(blocks: Sequence[int], own: tuple[int, ...], folder: Path) -> tuple[int, ...]:
    """Low-rank updates and bottleneck adapters stand in the same blocks, unless no block's linear layer is adapted."""
    if blocks and tuple(blocks) != own:
        raise AdapterError(
            f"adapter {folder}: layers {list(blocks)} are adapted and {list(own)} have bottlenecks; must be the same"
        )
    return own


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


def _base_shapes(base: Base) -> BaseShapes:
    """Of a base on disk, from its config."""
    try:
        return base_shapes(json.loads((base.path / "config.json").read_text()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AdapterError(
            f"base {base.name} in {base.path}: config cannot be read ({error!r}); prepare the base anew"
        ) from error


def trained_weights(base: Base, settings: "LoraSettings") -> int:
    """P, how many weights a round of these settings trains on a base, from its config alone.

    Raises:
        AdapterError: the config cannot be read, or the settings do not fit the base.
    """
    return layout(settings, _base_shapes(base))[-1].stop


@dataclass(frozen=True)
class _Ranks:
    """Rank by module."""

    default: int
    pattern: Sequence[tuple[str, int]]

    def __getitem__(self, module: str) -> int:
        return chosen(self.pattern, module, self.default)


def _places(
    weights: Mapping[str, "Tensor"], ranks: _Ranks, shapes: BaseShapes | None, folder: Path
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The layers and targets these weights adapt, after checking every name and shape."""
    found: dict[tuple[int, str], dict[str, tuple[int, ...]]] = {}
    for name, tensor in weights.items():
        layer, target, matrix = _parse_name(name, folder)
        if shapes and layer >= shapes.depth:
            raise AdapterError(
                f"{name} in {folder}: layer must be < {shapes.depth}; use it with the base it was trained on"
            )
        found.setdefault((layer, target), {})[matrix] = tuple(tensor.shape)
    if not found:
        raise AdapterError(f"adapter {folder}: has no weights; train it anew")
    layers = tuple(sorted({layer for layer, _ in found if layer >= 0}))
    targets = tuple(sorted({target for _, target in found}))
    for target in targets:
        for layer in (-1,) if target == HEAD else layers:
            _check_pair(found.get((layer, target), {}), layer, target, ranks, shapes, folder)
    return layers, targets


def _check_pair(
    pair: Mapping[str, tuple[int, ...]],
    layer: int,
    target: str,
    ranks: _Ranks,
    shapes: BaseShapes | None,
    folder: Path,
) -> None:
    """`A` and `B` of one linear layer are both there, in their shapes."""
    for matrix in ("A", "B"):
        if matrix not in pair:
            raise AdapterError(f"{weight_name(layer, target, matrix)} in {folder}: is missing; train it anew")
    rank = ranks[module_name(layer, target)]
    out_in = shapes.linear[target] if shapes else (pair["B"][0], pair["A"][-1])
    want = {"A": (rank, out_in[1]), "B": (out_in[0], rank)}
    for matrix in ("A", "B"):
        if pair[matrix] != want[matrix]:
            raise AdapterError(
                f"{weight_name(layer, target, matrix)} in {folder}: shape={pair[matrix]}, "
                f"must be {want[matrix]}; use it with the base and rank it was trained with"
            )


def _parse_name(name: str, folder: Path) -> tuple[int, str, str]:
    """(block, target, "A" or "B"); the block of the vocabulary projection is -1."""
    parts = name.split(".")
    matrix = parts[-2][-1:] if len(parts) > 1 else ""
    if name == weight_name(-1, HEAD, matrix):
        return -1, HEAD, matrix
    if len(parts) == 9 and parts[4].isdigit() and parts[6] in BLOCK_PART and parts[7] in {"lora_A", "lora_B"}:  # noqa: PLR2004
        layer, target = int(parts[4]), parts[6]
        if name == weight_name(layer, target, matrix):
            return layer, target, matrix
    if name.endswith((".base_layer.weight", "embed_tokens.weight")):
        raise AdapterError(
            f"weight {name[:200]!r} in {folder}: is the base's own; save the adapter with save_embedding_layers=False"
        )
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
