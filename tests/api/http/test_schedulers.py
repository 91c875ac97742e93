"""The list of schedulers."""

from starlette.testclient import TestClient

from domain.db import Database, db_now
from domain.workers.models import DutyLease
from domain.workers.repository import LEADER, record_scheduler


def test_schedulers_are_listed_by_name_and_one_leads(client: TestClient, database: Database) -> None:
    with database.transaction(write=True) as session:
        record_scheduler(session, "a", reaches_broker=True)
        record_scheduler(session, "b", reaches_broker=False)
        session.add(DutyLease(duty=LEADER, scheduler="b", expires_at=db_now(60)))
    page = client.get("/v1/schedulers").json()
    shown = [(each["id"], each["leads"], each["reaches_broker"]) for each in page["data"]]
    assert shown == [("a", False, True), ("b", True, False)]
    assert (page["first_id"], page["last_id"]) == ("a", "b")
    assert client.get("/v1/schedulers", params={"after": "a"}).json()["data"] == page["data"][1:]
