"""The folder of a bulk run with its plan and decisions, written without deciding; and an S3 server on loopback."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
from moto.server import ThreadedMotoServer

from sortd.bulk.plan import MANIFEST_SCHEMA, version_id
from sortd.bulk.storage import StoredFile, local_path, store_of

BUCKET = "photos"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def write_run(
    folder: Path,
    source: str,
    labels: Mapping[str, str | None],
    contents: Mapping[str, bytes] | None = None,
    *,
    rows_in_a_part: int = 1,
) -> Path:
    """Write a run and return its folder.

    Args:
        folder: of the run.
        source: what was planned.
        labels: by URI, the class that was decided on; None: it was abstained from.
        contents: by URI; without it, those of the files on this disk.
        rows_in_a_part: of the decisions.
    """
    rows, planned = [], []
    for uri, label in labels.items():
        path = Path(local_path(uri) or "")
        content = path.read_bytes() if contents is None else contents[uri]
        image = StoredFile(uri, len(content), path.lstat().st_mtime_ns if contents is None else 0)
        planned.append({"id": version_id(image), **asdict(image)})
        row: dict[str, Any] = {
            "id": version_id(image),
            "uri": uri,
            "label": label,
            "probability": 0.9,
            "margin": 0.5,
            "familiarity": 0.0,
            "reason": None if label else "margin",
            "encoder_id": "fake-48",
            "mode": "best",
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        rows.append(row)
    for name in ("decisions", "manifest"):
        (folder / name).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(planned, MANIFEST_SCHEMA), folder / "manifest" / "part-00000.parquet")
    numbers = dict.fromkeys(("probability", "margin", "familiarity"), pa.float64())
    schema = pa.schema([(name, numbers.get(name, pa.string())) for name in (rows[0] if rows else ())])
    rows.sort(key=lambda one: str(one["id"]))
    for start in range(0, len(rows), rows_in_a_part):
        part = pa.Table.from_pylist(rows[start : start + rows_in_a_part], schema)
        pq.write_table(part, folder / "decisions" / f"part-{start:05}.parquet")
    plan = {"version": 1, "source": source, "created": "2026-03-01T00:00:00+00:00", "count": len(rows)}
    (folder / "plan.json").write_text(json.dumps(plan), "utf-8")
    return folder


@contextmanager
def s3_server() -> Iterator[tuple[Any, dict[str, str]]]:
    """Run moto's server with one bucket; yield a client, and the environment by which pyarrow finds it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with redirect_stdout(StringIO()):
        server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        client = client_of(environment)
        client.create_bucket(Bucket=BUCKET)
        delete_all(client)  # of another server of this process, which a failure may have ended before it did so
        store_of.cache_clear()  # it may be of another server
        yield client, environment
        delete_all(client)  # another server of this process would have the same objects
        client.close()
    finally:
        server.stop()


def client_of(environment: Mapping[str, str]) -> Any:
    """Return a client of the server."""
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )


def delete_all(client: Any) -> None:
    """Delete every object of the bucket."""
    for one in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=one["Key"])


def objects(client: Any) -> dict[str, bytes]:
    """Return every object of the bucket by its key, but for the empty ones that pyarrow writes for folders."""
    found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    keys = [str(one["Key"]) for one in found if not one["Key"].endswith("/")]
    return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
