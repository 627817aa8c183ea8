from pathlib import Path

import pytest
import yaml

from tidegate.config import load, read_secret
from tidegate.errors import ConfigError

TEMPLATE = Path(__file__).resolve().parents[2] / "params.yaml"


@pytest.fixture
def params(tmp_path):
    raw = yaml.safe_load(TEMPLATE.read_text())

    def write(change=None):
        if change:
            change(raw)
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(raw))
        return file

    return write


def test_the_template_is_valid_and_origins_are_told(params):
    resolved = load(params(), {})
    assert resolved.origins["streams.support-desk.topic"] == "params.yaml"
    assert resolved.settings.streams["support-desk"].privacy.epsilon <= 8


def test_a_variable_overrides_and_is_named(params):
    name = "TIDEGATE__STREAMS__SUPPORT_DESK__LEARNER__STEPS"
    resolved = load(params(), {name: "7"})
    assert resolved.settings.streams["support-desk"].learner.steps == 7
    assert resolved.origins["streams.support-desk.learner.steps"] == name


def test_a_lora_setting_can_be_overridden_too(params):
    resolved = load(params(), {"TIDEGATE__STREAMS__SUPPORT_DESK__LEARNER__LORA__R": "4"})
    assert resolved.settings.streams["support-desk"].learner.lora.r == 4


def test_ranks_of_its_own_and_bottlenecks_do_not_go_together(params):
    def change(raw):
        raw["streams"]["support-desk"]["learner"] |= {"continual": "orthogonal", "lora": {"bottleneck": 4}}

    with pytest.raises(ConfigError, match=r"learner=.*continual=orthogonal: needs one rank everywhere"):
        load(params(change), {})


def test_patterns_keep_their_order_on_the_way_to_a_plan(params):
    from tidegate.planning import plan_arguments

    text = "{layers.2.*: 4, q_proj: 2, '.*_proj': 3}"
    resolved = load(params(), {"TIDEGATE__STREAMS__SUPPORT_DESK__LEARNER__LORA__RANK_PATTERN": text})
    lora = plan_arguments(resolved.settings.streams["support-desk"].learner)["lora"]
    assert lora.rank_pattern == (("layers.2.*", 4), ("q_proj", 2), (".*_proj", 3))


def test_an_unknown_variable_is_refused(params):
    with pytest.raises(ConfigError, match="TIDEGATE__SERVICE__COLOUR=red: no such setting"):
        load(params(), {"TIDEGATE__SERVICE__COLOUR": "red"})


STREAM = ("streams", "support-desk")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*STREAM, "privacy", "epsilon"), 0, r"streams\.support-desk\.privacy\.epsilon=0: .*greater than 0"),
        ((*STREAM, "privacy", "delta"), 0.5, r"privacy\.delta=0\.5: .*less than 0\.01"),
        ((*STREAM, "privacy", "unit"), "family", r"privacy\.unit='family': .*'record' or 'user'"),
        ((*STREAM, "learner", "steps"), "many", r"learner\.steps='many': .*integer"),
        ((*STREAM, "learner", "lora", "r"), -1, r"learner\.lora\.r=-1: .*greater than or equal to 1"),
        ((*STREAM, "learner", "lora", "rank_pattern"), {"q_proj": 0}, r"lora\.rank_pattern\.q_proj=0: .*equal to 1"),
        ((*STREAM, "learner", "lora", "rank_pattern"), {"k_pro": 4}, r"rank_pattern: 'k_pro' fits no target"),
        ((*STREAM, "learner", "lora", "alpha_pattern"), {"(q": 4}, r"alpha_pattern: '\(q' is no regular expression"),
        ((*STREAM, "learner", "lora", "targets"), ["embed"], r"targets=embed: must be among q_proj,.*lm_head"),
        ((*STREAM, "learner", "lora", "bottleneck"), -2, r"lora\.bottleneck=-2: .*greater than or equal to 0"),
        ((*STREAM, "learner", "lora", "bottleneck_places"), ["head"], r"places=head: must be among attention,mlp"),
        ((*STREAM, "learner", "lora", "nonlinearity"), "tanh", r"nonlinearity='tanh': .*'relu', 'gelu' or 'silu'"),
        ((*STREAM, "learner", "lora", "use_dora"), True, r"use_dora: is refused: DoRA rescales"),
        ((*STREAM, "learner", "precision"), "fp8", r"learner\.precision='fp8': .*'auto', 'fp32', 'bf16' or 'fp16'"),
        ((*STREAM, "learner", "recompute"), "twice", r"learner\.recompute='twice'"),
        ((*STREAM, "ingest", "domains"), [], r"ingest\.domains=\[\]"),
        ((*STREAM, "colour"), "red", r"support-desk\.colour='red': unknown setting"),
        (("service", "api", "port"), 70000, r"service\.api\.port=70000: .*65535"),
        (("streams",), {}, r"streams=\{\}"),
        ((*STREAM, "evaluation", "gates"), [], r"evaluation\.gates=\[\]: .*no gate is hard"),
        ((*STREAM, "evaluation", "gates"), [{"metric": "accuracy"}], r"evaluation\.gates\.0=.*needs a bound"),
        (
            (*STREAM, "evaluation", "gates"),
            [{"metric": "accuracy", "bound": 0.1}, {"metric": "accuracy", "bound": 0.2}],
            r"two gates are called accuracy",
        ),
        (
            (*STREAM, "evaluation", "gates"),
            [{"metric": "accuracy", "bound": 0.1, "data": "private"}],
            r"privacy\.holdout_evaluations must be > 0",
        ),
        ((*STREAM, "privacy"), {"enabled": False, "holdout_evaluations": 3}, r"holdout_evaluations must be 0"),
        ((*STREAM, "evaluation", "accuracy_min"), 0.5, r"evaluation\.accuracy_min=0\.5: unknown setting"),
    ],
)
def test_a_wrong_value_names_key_value_and_bound(params, path, value, message):
    def change(raw):
        node = raw
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value

    with pytest.raises(ConfigError, match=message):
        load(params(change), {})


def test_two_streams_cannot_share_a_model(params):
    def change(raw):
        raw["streams"]["other"] = {**raw["streams"]["support-desk"], "registry": {"model": "support-desk"}}

    with pytest.raises(ConfigError, match="one registered model"):
        load(params(change), {})


def test_a_missing_or_broken_file_says_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match="tidegate init"):
        load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load(tmp_path / "params.yaml")


def test_a_secret_is_read_only_from_a_private_file(tmp_path, monkeypatch):
    file = tmp_path / "sasl_password"
    file.write_text("hush\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret("sasl_password", tmp_path)
    file.chmod(0o600)
    assert read_secret("sasl_password", tmp_path) == "hush"
    monkeypatch.setenv("TIDEGATE_SASL_PASSWORD", "from the environment")
    assert read_secret("sasl_password", tmp_path) == "from the environment"
    assert read_secret("other", tmp_path) is None


def service_with(tmp_path, params, change):
    from tidegate.wiring import Service
    from tidegate.workspace import Workspace

    return Service(Workspace(tmp_path), load(params(change), {}))


def test_mlflow_s_tables_and_the_history_stand_where_a_database_server_is(tmp_path, params, monkeypatch):
    def mlflow_on_a_server(raw):
        raw["service"]["mlflow"]["backend"] = "postgresql://tide@db/mlflow"

    embedded = service_with(tmp_path, params, None)
    assert embedded.mlflow_backend_url == f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    assert embedded.approvals_url == f"sqlite:///{tmp_path / 'approvals.db'}"
    monkeypatch.setenv("TIDEGATE_MLFLOW_BACKEND_URL", "postgresql://tide:hush@db/mlflow")
    assert embedded.mlflow_backend_url == "postgresql://tide:hush@db/mlflow"
    assert embedded.approvals_url == "postgresql://tide:hush@db/mlflow"
    named = service_with(tmp_path, params, mlflow_on_a_server)
    assert named.mlflow_backend_url == "postgresql://tide@db/mlflow"
    monkeypatch.setenv("TIDEGATE_LEDGER_URL", "postgresql+psycopg://tide:hush@db/ledger")
    assert named.approvals_url == "postgresql+psycopg://tide:hush@db/ledger"


def test_the_ledger_s_database_is_not_mlflow_s(tmp_path, params, monkeypatch):
    monkeypatch.setenv("TIDEGATE_LEDGER_URL", "postgresql+psycopg://tide:hush@db/all")
    monkeypatch.setenv("TIDEGATE_MLFLOW_BACKEND_URL", "postgresql+psycopg2://tide:hush@db/all")
    with pytest.raises(ConfigError, match="must not be the ledger's database") as told:
        _ = service_with(tmp_path, params, None).mlflow_backend_url
    assert "hush" not in str(told.value)


def test_what_is_no_address_of_a_database_is_said(tmp_path, params):
    def wrong(raw):
        raw["service"]["mlflow"]["backend"] = "db.example.org"

    with pytest.raises(ConfigError, match=r"service.mlflow.backend: must be `embedded` or an SQLAlchemy URL"):
        _ = service_with(tmp_path, params, wrong).mlflow_backend_url


@pytest.mark.parametrize("word", ["off", False, "basic"])
def test_logins_are_off_or_basic_also_as_yaml_spells_off(params, word):
    asked = load(params(lambda raw: raw["service"]["mlflow"].update(auth=word)), {}).settings.service.mlflow.auth
    assert asked == ("basic" if word == "basic" else "off")


def test_a_registry_without_logins_listens_to_this_machine_alone_unless_told(params):
    def outside(**more):
        return params(lambda raw: raw["service"]["mlflow"].update(host="192.0.2.7", **more))

    with pytest.raises(
        ConfigError, match=r"host 192\.0\.2\.7 is reached from outside .* set auth: basic, or unprotected"
    ):
        load(outside(), {})
    assert load(outside(auth="basic"), {}).settings.service.mlflow.host == "192.0.2.7"
    assert load(outside(auth="off", unprotected=True), {}).settings.service.mlflow.unprotected


def test_four_eyes_need_logins(params):
    file = params(lambda raw: raw["streams"]["support-desk"]["registry"].update(four_eyes=True))
    with pytest.raises(
        ConfigError, match=r"support-desk\.registry\.four_eyes: true tells people apart by their logins"
    ):
        load(file, {})
    resolved = load(file, {"TIDEGATE__SERVICE__MLFLOW__AUTH": "basic"})
    assert resolved.settings.streams["support-desk"].registry.four_eyes is True
