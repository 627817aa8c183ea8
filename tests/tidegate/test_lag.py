"""How far blocks are behind the topic, on a real broker."""

import json
import threading

import pytest

from ingest.broker import TopicWriter
from ingest.embedded import EmbeddedBroker
from ingest.errors import BrokerUnreachable
from tests.tidegate.streams import STREAM, workspace
from tidegate import doctor, lag
from tidegate.config import load
from tidegate.wiring import Service, complete_workspace

RECORD = {"schema_version": 1, "domain": "billing", "prompt": "I was charged twice", "completion": "double charge",
          "label": "double_charge"}  # fmt: skip


@pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")
def test_lag_is_what_the_topic_holds_and_no_block_accounts_for(tmp_path):
    place = workspace(tmp_path / "ws", ingest={"block_offsets": 20, "docs_seconds": 0}).workspace
    complete_workspace(place)
    with EmbeddedBroker(tmp_path / "broker") as broker:
        names = {"TIDEGATE__SERVICE__BROKER__BOOTSTRAP": broker.bootstrap}
        service = Service(place, load(place.params, names))
        assert lag.look(service, STREAM) is None
        assert [f.grade for f in doctor.CHECKS["broker"](service)] == ["ok", "note"]
        with TopicWriter(service.kafka()) as writer:
            for number in range(30):
                record = {**RECORD, "event_id": f"e{number}", "user_id": f"u{number}"}
                writer.send(STREAM, None, json.dumps(record).encode())
            writer.flush()
        assert lag.look(service, STREAM).offsets == 30
        service.ingester(STREAM).run(threading.Event(), max_blocks=1)
        found = lag.look(service, STREAM)
        assert (found.offsets, found.behind) == (10, ((0, 10),))
        assert [f.grade for f in doctor.CHECKS["broker"](service)] == ["ok", "ok"]
    with pytest.raises(BrokerUnreachable):
        lag.look(service, STREAM)
