"""Stores of other authors: moto, which checks the signatures of S3, and Azurite, for Azure."""

import json
import re
import shutil
import subprocess
import urllib.request

import checkpoints
import pytest
from remote_store import store  # noqa: F401 - a fixture

import jaxshard as js
from jaxshard.errors import StorageError
from jaxshard.storage import object_store, upload

# of the account of every emulator, as Azure's documentation has it
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture
def llama(tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "PART_BYTES", 5 << 20)  # the least that S3 takes
    checkpoints.write_llama(tmp_path / "llama", layers=2, hidden=256, vocab=16_384)
    return tmp_path / "llama"


def _write_and_read(bucket, llama):
    """Everything that stores are used for, with real requests."""
    out = f"{bucket}/out"
    js.convert(llama, out, max_shard_size="9MB")
    assert not js.verify(out, llama).problems
    js.slice(out, f"{bucket}/cut", "mp2")
    assert js.slice(out, f"{bucket}/cut", "mp2", resume=True).skipped_files == 2
    js.slice(llama, out, "mp4", overwrite=True)
    assert not js.verify(out, f"{bucket}/cut").problems
    js.convert(out, f"{bucket}/all.safetensors")
    with pytest.raises(js.LayoutError, match="exists"):
        js.convert(out, f"{bucket}/all.safetensors")
    upload.Upload(f"{bucket}/begun", "a request")
    upload.Upload(f"{bucket}/begun", "a request", resume=True).publish({})
    assert js.load(f"{bucket}/all.safetensors", "mp2")


def _check_signatures_after(address, num_requests):
    headers = {"Content-Type": "text/plain"}
    where = f"{address}/moto-api/reset-auth"
    urllib.request.urlopen(urllib.request.Request(where, num_requests, headers)).close()


def test_requests_to_s3_are_signed(store, llama, monkeypatch):  # noqa: F811
    boto3 = pytest.importorskip("boto3", reason="boto3 creates the bucket and the user")
    moto = pytest.importorskip("moto.server", reason="moto checks the signatures of S3")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    own = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    how = {"endpoint_url": address, "region_name": "us-east-1", **own}
    try:
        boto3.client("s3", **how).create_bucket(Bucket="bucket")
        users = boto3.client("iam", **how)
        users.create_user(UserName="me")
        rule = {"Effect": "Allow", "Action": "*", "Resource": "*"}
        policy = {"Version": "2012-10-17", "Statement": [rule]}
        text = json.dumps(policy)
        users.put_user_policy(UserName="me", PolicyName="all", PolicyDocument=text)
        key = users.create_access_key(UserName="me")["AccessKey"]
        _check_signatures_after(address, b"0")
        monkeypatch.delenv("AWS_SKIP_SIGNATURE")
        monkeypatch.setenv("AWS_ENDPOINT", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        object_store.store_at.cache_clear()
        with pytest.raises(StorageError, match="refuses these credentials"):
            js.convert(llama, "s3://bucket/out")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        object_store.store_at.cache_clear()
        _write_and_read("s3://bucket", llama)
    finally:
        _check_signatures_after(address, b"inf")
        server.stop()


def test_azure_is_written_and_read(store, llama, tmp_path, monkeypatch):  # noqa: F811
    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("azurite-blob is not installed")
    blobs = pytest.importorskip("azure.storage.blob", reason="it creates the container")
    options = ("--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry")
    command = [azurite, "--blobPort", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            lines = iter(process.stdout.readline, "")
            address = next(a[0] for x in lines if (a := re.findall(r"http://127[\d.:]+", x)))
            monkeypatch.setenv("AZURE_ENDPOINT", f"{address}/devstoreaccount1")
            monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1")
            monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
            place = blobs.BlobServiceClient(
                f"{address}/devstoreaccount1",
                credential={"account_name": "devstoreaccount1", "account_key": KEY},
            )
            place.create_container("bucket")
            _write_and_read("az://bucket", llama)
        finally:
            process.terminate()
