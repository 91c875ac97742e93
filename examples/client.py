"""Upload, submit, follow and download: `python examples/client.py TEACHER STUDENT TRAIN VALIDATION DIRECTORY`.

The models are names of `pocl models list`, the others files. The service is that of `POCL_URL`, else the one on this
machine; the key that of `POCL_API_KEY_FILE` or of `pocl login`.
"""

import sys

from pocl_client import Client, ClientError
from pocl_client.models import Event


def distil(client: Client, teacher: str, student: str, train: str, validation: str, directory: str) -> int:
    files = {"train": train, "validation": validation}
    data = {name: {"dataset": client.datasets.upload(path).id} for name, path in files.items()}
    spec = {"preset": "quick", "teacher": {"path": teacher}, "student": {"path": student}, "data": data}
    job = client.jobs.create(spec, name="example")
    for message in client.jobs.stream(job.id):
        if isinstance(message.content, Event):
            print(message.content.at, message.content.type, message.content.data)
    # `best` scored highest on the held-out samples; `final` is there without any, too.
    found = client.checkpoints.newest(job.id, "best") or client.checkpoints.newest(job.id, "final")
    if found is None:
        print(f"{job.id} has no checkpoint: {client.jobs.get(job.id).end_reason}")
        return 1
    print(client.checkpoints.download(found.id, directory))
    return 0


def main(*arguments: str) -> int:
    with Client() as client:
        try:
            return distil(client, *arguments)
        except ClientError as error:
            print(f"refused: {error}")
            return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
