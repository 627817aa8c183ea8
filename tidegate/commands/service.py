"""`tidegate up` and the parts it runs, each also alone: broker, mlflow, ingest, learn, serve, route."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tidegate import output
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tidegate.wiring import Service


def _stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set, so that loops end where they are whole."""
    stop = threading.Event()

    def handle(_number: int, _frame: Any) -> None:
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def _open(given: str | None, acting: Literal["learner", "server"] = "learner") -> Service:
    from tidegate import log
    from tidegate.wiring import open_service

    log.configure()
    return open_service(given, acting)


@click.command()
@click.pass_obj
def up(given: str | None) -> None:
    """Run the whole service in this terminal: broker, registry, ingest, learner and server.

    Prints the addresses and a line per event. Ctrl-C stops everything cleanly; `kill -9` of this process does too.
    What params.yaml says is elsewhere (another Kafka, another MLflow) is used and not started.
    """
    from tidegate.up import start_all
    from tidegate.wiring import complete_workspace

    service = _open(given)
    stop = _stop_on_signals()
    complete_workspace(service.workspace)
    supervisor = start_all(service, output.say)
    try:
        output.say(f"MLflow   {service.mlflow_uri}")
        output.say(f"API      {service.api_uri}/v1   (OpenAI-compatible; model = the stream's name)")
        output.say(f"Kafka    {service.bootstrap}")
        output.say("ready; Ctrl-C stops everything")
        supervisor.watch(stop.is_set)
    finally:
        output.say("stopping")
        supervisor.stop()
        output.say("stopped")


@click.command()
@click.pass_obj
def broker(given: str | None) -> None:
    """Run the embedded Kafka-protocol broker alone, on service.broker.port. For one machine, not for production."""
    from ingest.embedded import EmbeddedBroker

    service = _open(given)
    stop = _stop_on_signals()
    with EmbeddedBroker(service.workspace.broker, port=service.settings.service.broker.port) as running:
        output.say(f"broker listens on {running.bootstrap}")
        while not stop.wait(1.0):
            running.check()


@click.command()
@click.pass_obj
def mlflow(given: str | None) -> None:
    """Run MLflow with the promotion guard alone: one worker, jobs off, loopback unless service.mlflow.host says so.

    With service.mlflow.auth: basic it asks for logins, and prints the admin's password when it first starts.
    """
    from registry.server import MlflowServer
    from tidegate.up import make_logins

    service = _open(given)
    stop = _stop_on_signals()
    settings = service.settings.service.mlflow
    service.signer("approvals")
    make_logins(service, output.say)
    with MlflowServer(
        service.workspace.root,
        host=settings.host,
        port=settings.port,
        approvals_url=service.approvals_url,
        keys_dir=service.keys_dir,
        open_models=service.open_models(),
        backend_url=service.mlflow_backend_url,
        public_names=(settings.host, *settings.names),
        logins=service.mlflow_logins(),
    ) as running:
        output.say(f"MLflow with the guard: {service.mlflow_uri}")
        while not stop.wait(1.0):
            running.check()


@click.command()
@click.argument("stream")
@click.option("--blocks", type=click.IntRange(min=1), help="Stop after this many blocks.")
@click.option("--idle", type=click.FloatRange(min=0), help="Stop after this many seconds without a new record.")
@click.pass_obj
def ingest(given: str | None, stream: str, *, blocks: int | None, idle: float | None) -> None:
    """Consume STREAM's topic: validate, seal blocks, version them in DVC and git.

    Resumes from the manifests, so that it may be killed at any moment and started again.
    """
    from ingest.ingester import spare_collector

    service = _open(given)
    stop = _stop_on_signals()
    port = service.stream(stream).ingest.metrics_port
    done: set[str] = set()

    def heard(name: str, facts: Mapping[str, Any]) -> None:
        if name not in {"resumed", "sealed"} or name in done:
            return
        done.add(name)
        if name == "sealed":
            # After the first block every library is loaded.
            spare_collector()
        elif port:
            lane = int(facts["lane"].rpartition("-")[2])
            _expose(port + lane, f"streams.{stream}.ingest.metrics_port", f"metrics of {stream}")

    service.ingester(stream, heard).run(stop, max_blocks=blocks, until_idle_s=idle)


def _settle(service: Service, stop: threading.Event) -> None:
    """Sign the kill switch's entries that could not be signed when they were made."""
    from tidegate import switches

    while not stop.wait(switches.SETTLE_SECONDS):
        switches.settle(service)


def _expose(port: int, setting: str, what: str) -> None:
    """Let Prometheus scrape this process on loopback: counts of ingest are exact, hence for the operator alone.

    Raises:
        ConfigError: the port is taken.
    """
    from prometheus_client import start_http_server

    try:
        start_http_server(port, addr="127.0.0.1")
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"{setting}: port {port}: {why}; choose another") from None
    output.say(f"{what} on http://127.0.0.1:{port}/metrics")


@click.command()
@click.pass_obj
def learn(given: str | None) -> None:
    """Run rounds of all streams every learner.schedule_seconds; a round runs when new blocks are there.

    With service.learn_metrics_port set, Prometheus can scrape what is left of every stream's budget.
    Webhooks (streams.NAME.hooks) are sent from here.
    """
    from tidegate import identities
    from tidegate.scheduler import run_schedule

    service, stop = _open(given), _stop_on_signals()
    if service.asks_logins:
        identities.forget_person()
    port = service.settings.service.learn_metrics_port
    if port:
        from tidegate.gauges import BudgetGauges, watch

        _expose(port, "service.learn_metrics_port", "budgets")
        threading.Thread(target=watch, args=(service, BudgetGauges(), stop), daemon=True).start()
    from tidegate import hooks

    telling = threading.Thread(target=hooks.watch, args=(service, stop), name="webhooks", daemon=True)
    telling.start()
    threading.Thread(target=_settle, args=(service, stop), name="switches", daemon=True).start()
    run_schedule(service, stop)


@click.command()
@click.option("--replica", metavar="URL", help="Which of service.replicas this server is, behind `tidegate route`.")
@click.pass_obj
def serve(given: str | None, replica: str | None) -> None:
    """Serve every stream's approved version under /v1, and swap it when the registry says so, without a restart."""
    from tidegate.serve import run_server

    run_server(_open(given, "server"), replica)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("stream")
@click.argument("more", nargs=-1, metavar="[-- ARGUMENTS OF VLLM'S OWN]")
@click.option(
    "--env", type=click.Path(), help="Environment that has vLLM; default: TIDEGATE_VLLM_ENV, else .venv-vllm."
)
@click.pass_obj
def vllm(given: str | None, stream: str, more: tuple[str, ...], env: str | None) -> None:
    """Run vLLM on STREAM's base at serving.vllm_url, taking adapters while it runs. For streams with engine: vllm."""
    from tidegate.vllm import ENVIRONMENT, run_vllm

    run_vllm(_open(given), stream, Path(env) if env else ENVIRONMENT, more)


@click.command()
@click.pass_obj
def route(given: str | None) -> None:
    """Route requests at service.api to service.replicas, each started by `serve --replica URL`.

    All of them answer with one version at any moment, and the registry hears of it when all run it. A replica that is
    ill gets nothing until it is well. Holds no model.
    """
    from tidegate.route import run_router

    run_router(_open(given, "server"))
