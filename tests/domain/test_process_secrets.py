"""Secrets that a process was started with are not readable in its environment."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, os
from domain.process_secrets import erase_secrets
erase_secrets()
shown = open("/proc/self/environ", "rb").read().decode()
child = os.popen("printenv POCL_API_KEY").read().strip()
print(json.dumps([shown, os.environ["POCL_API_KEY"], child]))
"""


@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="the file is Linux's")
def test_key_and_addresses_are_erased_from_the_environment_that_others_can_read() -> None:
    secrets = {
        "POCL_API_KEY": "key-of-the-api",
        "POCL_DATABASE_URL": "postgresql://me:password@db/x",
        "WANDB_API_KEY": "key-of-wandb",
    }
    environment = {**os.environ, **secrets, "POCL_HOME": "/somewhere"}
    completed = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    shown, own, child = json.loads(completed.stdout)
    assert not [value for value in secrets.values() if value in shown]
    assert "POCL_HOME=/somewhere" in shown
    assert (own, child) == ("key-of-the-api", "key-of-the-api")
