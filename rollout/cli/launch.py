"""moe-rollout launch: a fleet that others on this machine can use, until Ctrl-C."""

import argparse
import logging
import os
import signal
import socket
from dataclasses import replace

from rollout.cli.background import launch_in_background
from rollout.cli.memory import host_memory, refuse_shortage, room
from rollout.cli.stopping import stoppable
from rollout.cli.terminal import say
from rollout.config import RolloutConfig
from rollout.errors import ConfigError
from rollout.fleet import Fleet
from rollout.prospect import prospect_of
from rollout.whereabouts import Whereabouts

NAME = "launch"
SUMMARY = "start a fleet and look after it until Ctrl-C"
DESCRIPTION = """\
Starts the hosts of a configuration and stays in the foreground: it starts lost hosts again, and takes up new steps
where weights.transport is disk. Ctrl-C or SIGTERM ends the hosts and, unless RAY_ADDRESS named a cluster, the Ray that
was started for them. Other shells of this machine reach the fleet by its name.

With --detached the same goes on in the background, with a log file, and the command returns when the hosts are up."""

RAY_ADDRESS = "RAY_ADDRESS"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, see rollout.config.RolloutConfig")
    parser.add_argument("--detached", action="store_true", help="go on in the background, with a log file")
    parser.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="where Prometheus reads the metrics of this machine; metrics_port of the configuration unless said",
    )


def run(arguments: argparse.Namespace) -> int:
    """Refuses what cannot work, then launches."""
    config = RolloutConfig.from_yaml(arguments.config)
    if arguments.metrics_port is not None:
        config = replace(config, metrics_port=arguments.metrics_port)
    prospect = prospect_of(config, os.environ)
    check_port(config.metrics_port)
    check_name_is_free(config.name)
    if RAY_ADDRESS not in os.environ:  # a cluster has other machines
        refuse_shortage(config, host_memory(config, prospect.spec), room(config, prospect.platform))
    if arguments.detached:
        return launch_in_background(arguments.config, config)
    return _launch(config)


def check_port(port: int | None) -> None:
    """ConfigError where the port for metrics is taken, or is not ours to choose."""
    if port is None:
        return
    if RAY_ADDRESS in os.environ:
        raise ConfigError(
            f"metrics_port: {port}, but {RAY_ADDRESS} names a cluster that runs already, and its metrics have a port; "
            "remove one of the two (ray start takes --metrics-export-port)"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"metrics_port: {port} on this machine cannot be had ({(error.strerror or '').lower()}); "
                "choose another one with --metrics-port or metrics_port"
            ) from error


def check_name_is_free(name: str) -> None:
    """ConfigError where a fleet of this name runs on this machine."""
    other = Whereabouts.read(name)
    if other is not None:
        raise ConfigError(
            f"name: a fleet {name!r} runs on this machine already (process {other.launcher}); "
            "end that one first, or choose another name"
        )


def _launch(config: RolloutConfig) -> int:
    logging.getLogger("rollout").setLevel(logging.INFO)
    say(f"fleet {config.name}: starting {config.hosts} host{'s' if config.hosts > 1 else ''}")
    up = False
    with stoppable() as stopping:
        try:
            with Fleet.launch(config) as fleet:
                stopping.rearm()
                up = True
                say(f"fleet {config.name}: up, {_summary(fleet)}")
                say(f"in another shell: moe-rollout status {config.name}; here, Ctrl-C ends it")
                try:
                    while True:
                        signal.pause()
                finally:
                    say(f"fleet {config.name}: ending (up to {config.deadlines.stop_s:g} s)")
        except KeyboardInterrupt:
            say(f"fleet {config.name}: ended")
            if not up:
                raise
    return 0


def _summary(fleet: Fleet) -> str:
    version = fleet.status().version
    metrics = fleet.config.metrics_port
    where = "" if metrics is None else f", metrics at http://127.0.0.1:{metrics}/metrics"
    return f"{fleet.config.hosts} hosts serve {version}{where}"
