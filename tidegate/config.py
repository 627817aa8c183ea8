"""Settings: `params.yaml`, then the environment; typed and checked as a whole before anything runs.

Precedence, lowest first: built-in default, `params.yaml`, an environment variable `TIDEGATE__SECTION__KEY`
(stream names in capitals with `-` written `_`). Secrets are never in the file: see :func:`read_secret`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from evaluation.policy import DEFAULT, Rule
from learner.layout import BLOCK_PART, DORA_REFUSED, ONE_RANK, check_settings
from tidegate.errors import ConfigError
from tidegate.webhook import check_url

ENV_PREFIX = "TIDEGATE__"
STREAM_NAME = re.compile(r"[a-z][a-z0-9-]{0,40}\Z")
REPLICA_URL = re.compile(r"^http://([a-z0-9.-]+|\[[0-9a-f:]+\]):[1-9][0-9]{0,4}$")
Port = Annotated[int, Field(ge=0, le=65535)]
Rank = Annotated[int, Field(ge=1, le=512)]


LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BrokerSettings(_Section):
    """Where Kafka is. `embedded` starts a broker inside the workspace, for one machine."""

    bootstrap: str = "embedded"
    port: Port = 9092
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_username: str | None = None
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


class MlflowSettings(_Section):
    """Where the model registry is. `embedded` starts MLflow with the promotion guard in the workspace.

    Without logins everybody who reaches it may decide, so it then listens to this machine alone, unless
    `unprotected` says that something else stands in between.
    """

    uri: str = "embedded"
    host: str = "127.0.0.1"
    port: Port = 5000
    names: tuple[str, ...] = ()
    backend: str = "embedded"
    auth: Literal["off", "basic"] = "off"
    unprotected: bool = False

    @field_validator("auth", mode="before")
    @classmethod
    def _off_is_a_word(cls, auth: Any) -> Any:
        return "off" if auth is False else auth  # YAML takes a bare `off` for false

    @model_validator(mode="after")
    def _open_to_this_machine_alone(self) -> MlflowSettings:
        if self.auth == "off" and self.host not in LOOPBACK and not self.unprotected:
            raise ValueError(
                f"host {self.host} is reached from outside and asks for no login: set auth: basic, or "
                f"unprotected: true if something in front of it asks"
            )
        return self


class LedgerSettings(_Section):
    """Where the privacy ledger is: `embedded` is SQLite in the workspace, else an SQLAlchemy URL."""

    url: str = "embedded"


class DataSettings(_Section):
    """Where DVC pushes blocks: `embedded` is a folder of the workspace, else a DVC remote URL."""

    remote: str = "embedded"


class KeySettings(_Section):
    """Folder of the signing and split keys, relative to the workspace unless absolute."""

    directory: str = "keys"


class ApiSettings(_Section):
    """Address of the OpenAI-compatible API, and whether it asks for keys also where only this machine reaches it."""

    host: str = "127.0.0.1"
    port: Port = 8080
    require_keys: bool = False
    traces: Annotated[str, Field(pattern=r"^(|https?://[^\s]+)$")] = ""


class ServiceSettings(_Section):
    """What all streams of a workspace share."""

    broker: BrokerSettings = BrokerSettings()
    mlflow: MlflowSettings = MlflowSettings()
    ledger: LedgerSettings = LedgerSettings()
    data: DataSettings = DataSettings()
    keys: KeySettings = KeySettings()
    api: ApiSettings = ApiSettings()
    replicas: tuple[str, ...] = ()
    learn_metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    threads: Annotated[int, Field(ge=1, le=256)] = 2

    @field_validator("replicas")
    @classmethod
    def _addresses(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        for url in replicas:
            if not REPLICA_URL.match(url):
                raise ValueError(f"{url!r}: must be http://HOST:PORT and nothing behind it")
        if len(set(replicas)) != len(replicas):
            raise ValueError("names a replica twice")
        return replicas


class IngestSettings(_Section):
    """What a record may be, and when a block is sealed (by offsets or by clock, never by accepted count)."""

    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: tuple[str, ...] = ()
    prompt_chars_max: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    completion_chars_max: Annotated[int, Field(ge=1, le=1_000_000)] = 400
    block_offsets: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    block_seconds: Annotated[float, Field(gt=0, le=604_800)] = 300.0
    records_per_user_max: Annotated[int, Field(ge=1)] = 32
    docs_seconds: Annotated[float, Field(ge=0, le=604_800)] = 600.0
    metrics_port: Annotated[int, Field(ge=0, le=65_000)] = 0


class PrivacySettings(_Section):
    """The policy frozen with each block when it is sealed."""

    enabled: bool = True
    unit: Literal["record", "user"] = "record"
    epsilon: Annotated[float, Field(gt=0, le=50)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=0.01)] = 1e-5
    attempts: Annotated[int, Field(ge=1, le=20)] = 3
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    holdout_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    horizon: Annotated[str, Field(pattern=r"^(life|[1-9][0-9]{0,3}d)$")] = "life"
    holdout_epsilon: Annotated[float, Field(gt=0, le=50)] = 2.0
    holdout_evaluations: Annotated[int, Field(ge=0, le=100_000)] = 0

    @model_validator(mode="after")
    def _holdout_has_people(self) -> PrivacySettings:
        if self.holdout_evaluations and not self.holdout_share:
            raise ValueError("holdout_evaluations needs somebody in the holdout: holdout_share must be > 0")
        if self.holdout_evaluations and not self.enabled:
            raise ValueError("holdout_evaluations must be 0 where enabled is false: there is no account to pay from")
        return self


class LoraConfig(_Section):
    """What is trained, in peft's words where it has them; `layers` counts from the top (0: all)."""

    r: Rank = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    rslora: bool = False
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(BLOCK_PART)
    layers: Annotated[int, Field(ge=0)] = 6
    bottleneck: Annotated[int, Field(ge=0, le=4096)] = 0
    bottleneck_places: Annotated[tuple[str, ...], Field(min_length=1)] = ("mlp",)
    nonlinearity: Literal["relu", "gelu", "silu"] = "relu"

    @model_validator(mode="before")
    @classmethod
    def _no_dora(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("use_dora"):
            raise ValueError(DORA_REFUSED)
        return values

    @model_validator(mode="after")
    def _usable(self) -> LoraConfig:
        patterns = tuple(self.rank_pattern.items()), tuple(self.alpha_pattern.items())
        check_settings(self.targets, *patterns, self.bottleneck_places)
        return self


class EarlyStoppingSettings(_Section):
    """When a round ends before its last step; 0 steps: never. What it spent was charged for all of them."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    patience: Annotated[int, Field(ge=1)] = 3
    keep: Literal["best", "last"] = "best"
    signal: Literal["gate_set", "holdout"] = "gate_set"

    @field_validator("signal")
    @classmethod
    def _public(cls, signal: str) -> str:
        if signal == "holdout":
            raise ValueError(
                "must be gate_set: a look at the holdout is a release that its account pays for, and a round would "
                "spend in an hour what all evaluations of a year are made for"
            )
        return signal


class LearnerSettings(_Section):
    """One round's mathematics, and when rounds run."""

    schedule_seconds: Annotated[float, Field(gt=0)] = 600.0
    schedule: str = ""
    stuck_seconds: Annotated[float, Field(gt=0)] = 1800.0
    expected_batch: Annotated[int, Field(ge=1, le=20_000)] = 384
    steps: Annotated[int, Field(ge=1, le=100_000)] = 30
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    sampling_rate_max: Annotated[float, Field(gt=0, le=1)] = 0.5
    continual: Literal["sequential", "replay", "orthogonal", "average"] = "replay"
    replay_rate: Annotated[float, Field(ge=0, le=1)] = 0.25
    rank_groups: Annotated[int, Field(ge=1)] = 5
    average_weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    layer_rate_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    early_stopping: EarlyStoppingSettings = EarlyStoppingSettings()
    priors: dict[str, Annotated[float, Field(gt=0)]] = {}
    packing: bool = False
    max_tokens: Annotated[int, Field(ge=8)] = 256
    system: str | None = None
    waiting: Literal["hold", "supersede"] = "hold"
    checkpoint_steps: Annotated[int, Field(ge=1)] = 5
    test_noise: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    recompute: Literal["none", "reentrant", "non-reentrant"] = "none"
    lora: LoraConfig = LoraConfig()

    @field_validator("schedule")
    @classmethod
    def _times_that_come(cls, schedule: str) -> str:
        if schedule:
            from tidegate.scheduler import trigger_of

            try:
                trigger_of(schedule, 0.0)
            except ConfigError as error:
                raise ValueError(str(error)) from None
            except ImportError:  # a machine that runs no rounds: the one that does will say
                pass
        return schedule

    @field_validator("packing")
    @classmethod
    def _one_record_a_sequence(cls, packing: bool) -> bool:
        if packing:
            raise ValueError(
                "must be false: a packed sequence holds records of several people, whose gradients can no longer be "
                "told apart, so that one clip bounds none of them; batches of like length save the padding instead"
            )
        return packing

    @model_validator(mode="after")
    def _ranks_of_its_own(self) -> LearnerSettings:
        if self.continual == "orthogonal" and (self.lora.rank_pattern or self.lora.bottleneck):
            raise ValueError(ONE_RANK)
        return self


class EvaluationSettings(_Section):
    """The public gate set, and the gates: what a candidate must show."""

    gate_set: str
    samples_min: Annotated[int, Field(ge=1)] = 100
    samples_per_domain_min: Annotated[int, Field(ge=1)] = 20
    gates: tuple[Rule, ...] = DEFAULT

    @field_validator("gates")
    @classmethod
    def _gates_decide(cls, gates: tuple[Rule, ...]) -> tuple[Rule, ...]:
        titles = [rule.title for rule in gates]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"two gates are called {', '.join(twice)}; give one of them another name")
        if not any(rule.hard for rule in gates):
            raise ValueError("no gate is hard, so that every candidate would pass; set one with a bound to hard: true")
        return gates

    @property
    def private(self) -> bool:
        """Whether a gate asks the stream's own holdout."""
        return any(rule.data == "private" for rule in self.gates)


class RegistrySettings(_Section):
    """The registered model's name in MLflow; empty: the stream's name. And what pruning leaves to roll back to.

    `four_eyes: auto` is true where MLflow asks for logins.
    """

    model: str = ""
    four_eyes: bool | Literal["auto"] = "auto"
    keep_previous: Annotated[int, Field(ge=1, le=10_000)] = 10


class CanarySettings(_Section):
    """When a canary is worse than what is live; see serving/comparing.py."""

    false_alarm: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    requests_min: Annotated[int, Field(ge=5, le=1000)] = 20
    latency_ratio: Annotated[float, Field(ge=1, le=100)] = 1.2


class ServingSettings(_Section):
    """How answers are made."""

    engine: Literal["inprocess", "vllm"] = "inprocess"
    vllm_url: Annotated[str, Field(pattern=REPLICA_URL.pattern)] = "http://127.0.0.1:8100"
    vllm_dtype: Literal["float32", "bfloat16"] = "float32"
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.5
    batch_max: Annotated[int, Field(ge=1, le=512)] = 16
    queue_max: Annotated[int, Field(ge=1)] = 256
    max_tokens: Annotated[int, Field(ge=1)] = 256
    answer_seconds_max: Annotated[float, Field(ge=0, le=86_400)] = 120.0
    log_prompts: bool = False
    resident_mb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 256.0
    shadow: Annotated[float, Field(ge=0, le=1)] = 0.0
    canary: CanarySettings = CanarySettings()


HookEvent = Literal[
    "candidate", "canary", "stepped_back", "promoted", "rejected", "refused", "rolled_back", "budget_low", "alarm"
]


class HookSettings(_Section):
    """Who is told of a stream's events by signed webhooks; the secret is TIDEGATE_HOOK_SECRET or a key file."""

    urls: tuple[str, ...] = ()
    events: tuple[HookEvent, ...] = get_args(HookEvent)
    insecure: bool = False

    @model_validator(mode="after")
    def _safe_addresses(self) -> HookSettings:
        for url in self.urls:
            check_url(url, insecure=self.insecure)
        return self


class StreamSettings(_Section):
    """One adapter's world."""

    topic: str
    base: str = "smollm2-135m"
    ingest: IngestSettings
    privacy: PrivacySettings = PrivacySettings()
    learner: LearnerSettings = LearnerSettings()
    evaluation: EvaluationSettings
    registry: RegistrySettings = RegistrySettings()
    serving: ServingSettings = ServingSettings()
    hooks: HookSettings = HookSettings()

    @model_validator(mode="after")
    def _priors_name_all_of_a_kind(self) -> StreamSettings:
        named = set(self.learner.priors)
        if named and named not in (set(self.ingest.domains), set(self.ingest.labels)):
            raise ValueError(
                f"learner.priors names {', '.join(sorted(named))}: must name every one of ingest.domains, or every one "
                f"of ingest.labels, each with the share that is expected of it"
            )
        return self

    @model_validator(mode="after")
    def _engine_has_what_is_trained(self) -> StreamSettings:
        if self.serving.engine == "vllm" and self.learner.lora.bottleneck:
            raise ValueError(
                "serving.engine: vllm has no bottleneck adapters; learner.lora.bottleneck must be 0; or inprocess"
            )
        return self

    @model_validator(mode="after")
    def _private_scores_are_paid(self) -> StreamSettings:
        if self.evaluation.private and not self.privacy.holdout_evaluations:
            raise ValueError(
                "evaluation.gates with data: private read the holdout: privacy.holdout_evaluations must be > 0 to pay"
            )
        return self


class Settings(_Section):
    """Everything in `params.yaml`."""

    service: ServiceSettings = ServiceSettings()
    streams: Annotated[dict[str, StreamSettings], Field(min_length=1)]

    @field_validator("streams")
    @classmethod
    def _names(cls, streams: dict[str, StreamSettings]) -> dict[str, StreamSettings]:
        for name in streams:
            if not STREAM_NAME.match(name):
                raise ValueError(f"stream name {name!r}: must match [a-z][a-z0-9-]*, at most 41 characters")
        return streams

    @model_validator(mode="after")
    def _four_eyes_need_logins(self) -> Settings:
        asking = self.service.mlflow.auth == "basic"
        for name, stream in self.streams.items():
            if stream.registry.four_eyes is True and not asking:
                raise ValueError(
                    f"streams.{name}.registry.four_eyes: true tells people apart by their logins; "
                    f"set service.mlflow.auth: basic"
                )
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> Settings:
        models = [s.registry.model or name for name, s in self.streams.items()]
        if len(set(models)) != len(models):
            raise ValueError("two streams share one registered model; give each its own registry.model")
        return self


@dataclass(frozen=True)
class Resolved:
    """Settings with, for every leaf, where its value came from (`default`, `params.yaml`, a variable's name)."""

    settings: Settings
    origins: Mapping[str, str]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        return [leaf for key, child in value.items() for leaf in _leaves(child, (*path, str(key)))]
    return [(path, value)]


def _env_key(path: tuple[str, ...]) -> str:
    return ENV_PREFIX + "__".join(part.upper().replace("-", "_") for part in path)


def _known_paths(raw: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Every variable name that would set something, by the path it sets."""
    known: dict[str, tuple[str, ...]] = {}

    def walk(model: type[BaseModel], path: tuple[str, ...]) -> None:
        for name, field in model.model_fields.items():
            here = (*path, name)
            if here == ("streams",):
                for stream in raw.get("streams") or {}:
                    walk(StreamSettings, ("streams", str(stream)))
            elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation, here)
            else:
                known[_env_key(here)] = here

    walk(Settings, ())
    return known


def _apply_environment(raw: dict[str, Any], environ: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    known = _known_paths(raw)
    origins: dict[tuple[str, ...], str] = {}
    for name, text in sorted(environ.items()):
        if not name.startswith(ENV_PREFIX):
            continue
        if name not in known:
            raise ConfigError(f"{name}={text}: no such setting; `tidegate config` lists the names")
        path, node = known[name], raw
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = yaml.safe_load(text)
        origins[path] = name
    return origins


def _explain(error: ValidationError, file: Path, origins: Mapping[tuple[str, ...], str]) -> str:
    lines = []
    for item in error.errors(include_url=False):
        path = tuple(str(part) for part in item["loc"])
        where = origins.get(path, file.name)
        value = "" if item["type"] == "missing" else f"={item['input']!r}"
        what = "unknown setting" if item["type"] == "extra_forbidden" else item["msg"]
        lines.append(f"{where}: {'.'.join(path) or 'settings'}{value[:80]}: {what}")
    return "; ".join(lines) + f". Mend {file} and run `tidegate config`"


def load(file: Path, environ: Mapping[str, str] | None = None) -> Resolved:
    """Read and check all settings.

    Raises:
        ConfigError: the file is missing, is not YAML, or a setting is unknown, mistyped or out of bounds;
            the message names each key, its value and its bound.
    """
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `tidegate init DIR` makes a workspace with one") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: must hold a mapping with `service` and `streams`")
    written = {path for path, _ in _leaves(raw)}
    by_env = _apply_environment(raw, os.environ if environ is None else environ)
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, file, by_env)) from None
    origins = {}
    for path, _ in _leaves(settings.model_dump(mode="json")):
        origin = "params.yaml" if path in written else "default"
        origins[".".join(path)] = by_env.get(path, origin)
    return Resolved(settings, origins)


def read_secret(name: str, keys: Path) -> str | None:
    """A secret from the variable `TIDEGATE_NAME`, or from the file `keys/name` of mode 0600; None if neither is.

    Raises:
        ConfigError: the file can be read by others.
    """
    if (value := os.environ.get(f"TIDEGATE_{name.upper()}")) is not None:
        return value
    file = keys / name
    if not file.exists():
        return None
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{file}: mode {mode:04o} lets others read it; must be 0600: chmod 600 {file}")
    return file.read_text(encoding="utf-8").strip()
