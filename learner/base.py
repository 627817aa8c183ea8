"""Base models: found or made once, kept in a cache, named with their provenance and licence.

A base is a folder with a Qwen2-architecture model (`config.json`, `*.safetensors`), its tokenizer
(`tokenizer.json` …) and, in the cache, `provenance.json`: where it comes from, its licence, and the sha256 of
every file. The base's own sha256 is taken over those, so that an adapter, a plan and a model version can all
say which base they mean.

Importing this file costs nothing: torch and transformers are imported where they are used.
"""

import fcntl
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import structlog

from learner import smollm2
from learner.errors import BaseModelError
from privacy.canonical import sha256_of

EMBEDDED = "smollm2-135m"
# The learner replaces the linear layers of this architecture by name; Qwen2.5 is published as it too.
ARCHITECTURE = "qwen2"
_PROVENANCE = "provenance.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a model is made of. Everything else in a folder (README, images) is neither loaded nor hashed.
_PARTS = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what begins now)."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    Attributes:
        path: the folder to load from.
        sha256: over the canonical {file name: sha256} of weights, config and tokenizer.
        name: what it is called in plans, model versions and reports.
        licence: as its publisher states it, or "unknown".
        provenance: author, source, transformation and the like, as plain strings.
    """

    path: Path
    sha256: str
    name: str
    licence: str
    provenance: Mapping[str, str] = field(hash=False)

    def as_json(self) -> dict[str, Any]:
        """JSON form, without the path: that is this machine's business."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "licence": self.licence,
            "provenance": dict(self.provenance),
        }


def prepare_base(spec: str, cache: Path, progress: Progress | None = None) -> Base:
    """Find or make a base model. Idempotent, atomic; when two processes ask at once, one works and one waits.

    Args:
        spec: "smollm2-135m" (the embedded default), a local folder, or a hub id such as
            "Qwen/Qwen2.5-0.5B-Instruct".
        cache: the workspace's folder for bases; made when missing.
        progress: told about each step of the first preparation.

    Raises:
        BaseModelError: nothing of that name can be had, or it is no Qwen2 model with a tokenizer.
    """
    step = progress or (lambda _done, _total, _what: None)
    local = Path(spec).expanduser()
    with _locked(cache, _slug(spec)):
        if spec == EMBEDDED:
            return _prepared(cache / _slug(spec), lambda folder: _make_embedded(folder, step))
        if local.is_dir():
            return _from_folder(local.resolve(), cache)
        if _HUB_ID.fullmatch(spec):
            return _prepared(cache / _slug(spec), lambda folder: _make_from_hub(spec, folder, step))
    raise BaseModelError(
        f"base={spec!r}: must be {EMBEDDED!r}, an existing folder, "
        "or a hub id like 'Qwen/Qwen2.5-0.5B-Instruct'; see params.yaml"
    )


def is_prepared(spec: str, cache: Path) -> bool:
    """Whether `prepare_base` would find the base at once: nothing is made or downloaded for it."""
    local = spec != EMBEDDED and Path(spec).expanduser().is_dir()
    return local or (cache / _slug(spec) / _PROVENANCE).is_file()


def load_model(base: Base, dtype: Any = None) -> Any:
    """The base as a frozen `Qwen2ForCausalLM`: sdpa attention, eval mode, no gradients asked for.

    Weights are of `dtype`, a torch.dtype, fp32 if None; rotary frequencies stay fp32, as casting a loaded model would
    not leave them. sdpa because it is a tenth faster than eager.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    try:
        with smollm2.without_bars():
            model = Qwen2ForCausalLM.from_pretrained(
                base.path, dtype=dtype or torch.float32, attn_implementation="sdpa", local_files_only=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(
            f"base {base.name} in {base.path}: cannot be loaded ({error}); remove it to prepare it anew"
        ) from error
    return model.eval().requires_grad_(requires_grad=False)


def load_tokenizer(base: Base) -> Any:
    """The base's own fast tokenizer, chat template included.

    Read from `tokenizer.json` as it stands: AutoTokenizer would force Qwen2's pre-tokeniser on it.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(base.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"tokenizer of {base.name} in {base.path}: cannot be loaded ({error}); prepare it anew"
        ) from error


def _slug(spec: str) -> str:
    """A folder name for a spec: readable, and different for different specs."""
    readable = re.sub(r"[^\w.-]+", "-", spec).strip("-.")[-60:]
    return f"{readable}-{sha256(spec.encode()).hexdigest()[:8]}"


@contextmanager
def _locked(cache: Path, slug: str) -> Iterator[None]:
    """One preparation at a time per spec; the kernel drops the lock when its holder dies."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{slug}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepared(folder: Path, make: Callable[[Path], tuple[str, str, dict[str, str]]]) -> Base:
    """The base kept in `folder`; when there is none, `make` it beside and rename it into place."""
    if not (folder / _PROVENANCE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".preparing-", dir=folder.parent))
        try:
            name, licence, provenance = make(work)
            _check(work)
            digest, files = _hashes(work, {})
            _write_provenance(
                work,
                {
                    "name": name,
                    "licence": licence,
                    "sha256": digest,
                    "provenance": provenance,
                    "files": files,
                },
            )
            work.rename(folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        log.info("base prepared", base=name, licence=licence, folder=str(folder))
    kept = _read_provenance(folder)
    digest, files = _hashes(folder, kept["files"])
    if digest != kept["sha256"]:
        raise BaseModelError(
            f"base {kept['name']} in {folder}: sha256={digest}, must be {kept['sha256']} as prepared; "
            "remove the folder to prepare it anew"
        )
    if files != kept["files"]:  # copied or restored: same content, other times
        _write_provenance(folder, {**kept, "files": files})
    return Base(folder, digest, kept["name"], kept["licence"], kept["provenance"])


def _from_folder(folder: Path, cache: Path) -> Base:
    """A local folder is used where it lies; its hashes are kept in the cache."""
    _check(folder)
    home = cache / _slug(str(folder))
    home.mkdir(exist_ok=True)
    known = _read_provenance(home)["files"] if (home / _PROVENANCE).is_file() else {}
    digest, files = _hashes(folder, known)
    # A folder that another cache has prepared brings its own name, licence and provenance along.
    own = _read_provenance(folder) if (folder / _PROVENANCE).is_file() else None
    kept: dict[str, Any] = {
        "name": own["name"] if own else folder.name,
        "licence": own["licence"] if own else _card_licence(folder),
        "sha256": digest,
        "provenance": own["provenance"] if own else {"source": "local folder"},
        "files": files,
    }
    _write_provenance(home, kept)
    return Base(folder, digest, kept["name"], kept["licence"], kept["provenance"])


def _make_embedded(folder: Path, step: Progress) -> tuple[str, str, dict[str, str]]:
    steps = 4
    done = iter(range(steps))
    provenance = smollm2.write_as_qwen2(folder, lambda what: step(next(done), steps, what))
    # Which transformers wrote it is no property of the model: without it the hash is the same everywhere.
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    step(steps, steps, "done")
    return smollm2.NAME, smollm2.LICENCE, provenance


def _make_from_hub(spec: str, folder: Path, step: Progress) -> tuple[str, str, dict[str, str]]:
    from huggingface_hub import snapshot_download

    step(0, 1, f"downloading {spec}")
    try:
        snapshot = snapshot_download(spec, cache_dir=folder.parent / "hub", allow_patterns=[*_PARTS, "README.md"])
    except Exception as error:  # the hub client lets errors of several HTTP and file libraries through
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BaseModelError(
            f"base={spec}: cannot be downloaded ({cause}); name a local folder, or use {EMBEDDED!r}"
        ) from error
    for path in Path(snapshot).iterdir():
        if path.is_file():  # hub folders hold links into its blob store: the base must stand alone
            shutil.copyfile(path, folder / path.name)
    step(1, 1, "done")
    author = spec.partition("/")[0]
    return (
        spec,
        _card_licence(folder),
        {"author": author, "source": f"hub:{spec}", "revision": Path(snapshot).name},
    )


def _check(folder: Path) -> None:
    """Refuse a folder that is no Qwen2-architecture model with safetensors and a fast tokenizer."""
    for part in ("config.json", "tokenizer.json"):
        if not (folder / part).is_file():
            raise BaseModelError(
                f"base folder {folder}: {part} is missing; save model and tokenizer with save_pretrained"
            )
    try:
        architecture = json.loads((folder / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise BaseModelError(f"{folder / 'config.json'}: is no JSON object ({error}); save the model anew") from error
    if architecture != ARCHITECTURE:
        raise BaseModelError(
            f"model_type={architecture!r} in {folder / 'config.json'}: must be {ARCHITECTURE!r}; "
            f"use a Qwen2.5 model or {EMBEDDED!r}"
        )
    if not any(folder.glob("*.safetensors")):
        raise BaseModelError(f"base folder {folder}: no *.safetensors in it; save the model with save_pretrained")


def _card_licence(folder: Path) -> str:
    """The licence in the model card's front matter, or "unknown"."""
    card = folder / "README.md"
    head = card.read_text(errors="replace")[:4000] if card.is_file() else ""
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", head, re.MULTILINE)
    return found.group(1) if found else "unknown"


def _read_provenance(folder: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads((folder / _PROVENANCE).read_text())
        return {key: kept[key] for key in ("name", "licence", "sha256", "provenance", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise BaseModelError(
            f"{folder / _PROVENANCE}: cannot be read ({error!r}); remove {folder} to prepare the base anew"
        ) from error


def _write_provenance(folder: Path, kept: Mapping[str, Any]) -> None:
    new = folder / f"{_PROVENANCE}.new"
    new.write_text(json.dumps(kept, indent=2) + "\n")
    new.replace(folder / _PROVENANCE)


def _hashes(folder: Path, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The base's sha256, and each part's size, time and hash. Unchanged parts of `known` are not re-read."""
    files: dict[str, Any] = {}
    for path in sorted({path for part in _PARTS for path in folder.glob(part)}):
        stat = path.stat()
        state = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        old = known.get(path.name, {})
        if old and {key: old[key] for key in state} == state:
            files[path.name] = old
            continue
        with path.open("rb") as file:
            files[path.name] = {**state, "sha256": file_digest(file, "sha256").hexdigest()}
    return sha256_of({name: state["sha256"] for name, state in files.items()}), files
