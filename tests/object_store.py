"""A real S3-compatible server, in a process of its own on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from pyarrow import fs

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class Store:
    """The server; ``url`` of a folder in its only bucket."""

    endpoint: str

    def url(self, path: str, bucket: str = "bucket") -> str:
        return f"s3://{bucket}/{path}?scheme=http&endpoint_override={self.endpoint}"

    @property
    def files(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(endpoint_override=self.endpoint, scheme="http", allow_bucket_creation=True)

    def names(self, path: str) -> list[str]:
        """Every object below a folder, in order."""
        found = self.files.get_file_info(fs.FileSelector(f"bucket/{path}", recursive=True, allow_not_found=True))
        return sorted(info.path.removeprefix(f"bucket/{path}/") for info in found if info.type == fs.FileType.File)

    def read(self, path: str) -> bytes:
        with self.files.open_input_file(f"bucket/{path}") as file:
            return file.read()

    def overwrite(self, path: str, body: bytes) -> None:
        with self.files.open_output_stream(f"bucket/{path}") as file:
            file.write(body)

    def delete(self, path: str) -> None:
        self.files.delete_file(f"bucket/{path}")


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    log = tmp_path_factory.mktemp("s3") / "server.log"
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            store = Store(_endpoint(process, log))
            store.files.create_dir("bucket")
            yield store
        finally:
            process.terminate()
            process.wait(10)
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _endpoint(process, log) -> str:
    patience = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < patience:
        if found := re.search(rb"http://(127\.0\.0\.1:\d+)", log.read_bytes()):
            return found[1].decode()
        time.sleep(0.05)
    pytest.fail(f"the S3 server did not start: {log.read_text()[-500:]}")
