"""The service: a source in, events out, until it is told to stop.

What is the same for all sources: the engine, health and metrics, the bundle that is taken anew. The loops are
in `stream.zmq_worker` and `stream.kafka_worker`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from engine.choice import open_session
from stream import kafka_worker, zmq_worker
from stream.config import ServiceConfig
from stream.counters import Counters
from stream.health import Health, HealthServer, HttpSettings
from stream.notify import Notifier
from stream.opening import Replacement
from stream.reload import Reload
from stream.surroundings import Stopped, Surroundings

log = logging.getLogger(__name__)


def serve(
    config: ServiceConfig,
    stop: threading.Event,
    on_ready: Callable[[str], None] | None = None,
    reload: Reload | None = None,
) -> Counters:
    """Run until `stop` is set; returns what was counted. `on_ready` is told where it takes messages from.

    Raises BundleError or ConfigError before it is ready; afterwards only what the machine refuses (a full
    disk). The log line that begins with "ready" says that messages are taken, and where.
    """
    counters = Counters()
    notifier = Notifier()
    http = config.http
    health = Health(
        ("engine", "source"), HttpSettings().stalled_after if http is None else http.stalled_after
    )
    reload = reload or Reload(config.bundle, config.watch_bundle)
    engine = partial(open_session, config.bundle, config.max_streams, config.threads, config.engine)
    with ExitStack() as stack:
        stack.callback(notifier.close)
        if http is not None:
            server = stack.enter_context(HealthServer(http, health, counters.registry))
            log.info("health and metrics at http://%s", server.address)

        def ready(where: str) -> None:
            notifier.ready()
            if on_ready is not None:
                on_ready(where)

        around = Surroundings(
            engine, counters, health, notifier, stop, Replacement(engine, reload), ready, config.grace
        )
        try:
            if config.source.kafka is not None:
                kafka_worker.work(config, config.source.kafka, around)
            elif config.source.zmq is not None:
                zmq_worker.work(config, config.source.zmq, around)
        except Stopped as found:
            log.info("stopped %s", found)
        notifier.stopping()
    log.info("stopped: %s", counters.summary())
    return counters
