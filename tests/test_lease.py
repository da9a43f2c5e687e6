"""One driver at a time for an output in an object store."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from raycompress import lease as module
from raycompress.errors import ConfigError, RaycompressError
from raycompress.output import lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "EXPIRY", 1.0)
    monkeypatch.setattr(module, "SETTLE", 0.2)


HOLDER = """
import sys, time
from raycompress import lease
from raycompress.output import lock
from raycompress.storage import place_of
lease.BEAT = 0.1
with lock(place_of(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(remote):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(remote)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_driver_is_refused(remote, holder):
    with pytest.raises(ConfigError) as caught, lock(remote):
        pass
    assert str(caught.value).startswith(
        f"output {remote} is being written by another driver (process {holder.pid} on "
    )
    assert holder.poll() is None


def test_a_killed_drivers_place_is_taken(remote, holder):
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with lock(remote):
        assert time.monotonic() - start > module.EXPIRY
        assert json.loads((remote / "lock").read_bytes())["holder"].startswith(
            f"process {os.getpid()} "
        )


def test_a_driver_that_ended_leaves_no_trace(remote):
    for _ in range(2):
        start = time.monotonic()
        with lock(remote):
            assert time.monotonic() - start < module.EXPIRY
        assert not (remote / "lock").exists()
    with pytest.raises(ZeroDivisionError), lock(remote):
        raise ZeroDivisionError
    assert not (remote / "lock").exists()


def test_of_two_at_once_one_goes_on(remote):
    held, refused = [], []
    ready = threading.Barrier(2)

    def drive() -> None:
        ready.wait()
        try:
            with lock(remote):
                held.append(1)
                time.sleep(0.5)
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=drive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 1


def test_who_lost_the_lease_is_interrupted_and_leaves_it_alone(remote):
    other = module._Lease(remote)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RaycompressError, match="was taken over by another driver"), lock(remote):
        with pytest.raises(KeyboardInterrupt):
            other._write()
            time.sleep(10)
    assert signal.getsignal(signal.SIGINT) is before
    assert other._is_own(other._read())
